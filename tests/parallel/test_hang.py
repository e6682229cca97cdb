"""The text of reports, from made-up accounts of ranks."""

from __future__ import annotations

from typing import Any

from megalm.parallel.hang import Absent, Status, hang_report

HEAD = "megalm: a collective has not completed within 600 s (launch.collective_timeout)"


class Account:
    """What one rank tells, built call by call."""

    def __init__(self, *phases: str) -> None:
        self.groups: list[list[Any]] = []
        self.open: list[dict[str, Any]] = []
        self.recent: list[dict[str, Any]] = []
        self.phases = list(phases)
        self.more: dict[str, Any] = {}

    def _call(self, axis: str, ranks: tuple[int, ...], kind: str, about: dict[str, str], age: float) -> dict[str, Any]:
        key = [axis, list(ranks)]
        if key not in [group[:2] for group in self.groups]:
            self.groups.append([*key, 0])
        place = [group[:2] for group in self.groups].index(key)
        self.groups[place][2] += 1
        number = self.groups[place][2]
        return {
            "group": place,
            "call": number,
            "kind": kind,
            "about": about,
            "phases": list(self.phases),
            "age": age,
        }

    def did(
        self, axis: str, ranks: tuple[int, ...], kind: str = "all_reduce", age: float = 700.0, **about: str
    ) -> Account:
        self.recent.append(self._call(axis, ranks, kind, about, age))
        return self

    def waits(
        self,
        axis: str,
        ranks: tuple[int, ...],
        kind: str = "all_reduce",
        age: float = 650.0,
        queued: bool = False,
        error: str | None = None,
        **about: str,
    ) -> Account:
        call = self._call(axis, ranks, kind, about, age)
        self.open.append({**call, "queued": queued, "error": error, "frames": ["train.py:9 step", "train.py:2 main"]})
        return self

    def left(self, why: str) -> Account:
        self.more["gone"] = why
        return self

    @property
    def status(self) -> Status:
        return Status.parse(
            {
                "groups": self.groups,
                "open": self.open,
                "recent": self.recent,
                "phases": self.phases,
                "frames": ["data.py:7 read"],
                **self.more,
            }
        )


def report(*accounts: Account | None, absent: dict[int, Absent] | None = None, blind: str | None = None) -> list[str]:
    statuses = {rank: account.status for rank, account in enumerate(accounts) if account is not None}
    others = {rank: Absent("process 17 on node4") for rank in range(len(accounts)) if rank not in statuses}
    return hang_report(HEAD, statuses, len(accounts), absent or others, blind).splitlines()


def test_the_whole_of_one() -> None:
    found = report(
        Account("step 7", "loss").did("tp", (0, 1), dtype="float32").waits("tp", (0, 1), dtype="float32", shape="[3]"),
        Account("step 7", "forward").did("tp", (0, 1), dtype="float32", age=651.0),
        None,
    )
    assert found == [
        HEAD,
        "  culprit: rank 1 is in no collective, but rank 0 waits for it in all_reduce, call 2 of group tp [0, 1]",
        "  parted: at call 1 of group tp [0, 1]: rank 0 in all_reduce(dtype float32) during step 7 > loss; rank 1 in "
        "all_reduce(dtype float32) during step 7 > forward",
        "  rank 0: waits in all_reduce(dtype float32, shape [3]), call 2 of group tp [0, 1], for 650 s",
        "      missing: rank 1; there: rank 0",
        "      during: step 7 > loss",
        "      at train.py:9 step < train.py:2 main",
        "  rank 1: is in no collective",
        "      its last in tp [0, 1]: call 1, over since 651 s: all_reduce(dtype float32)",
        "      during: step 7 > forward",
        "      at data.py:7 read",
        "  rank 2: does not answer (process 17 on node4): killed, suspended, in code that keeps Python from running, "
        "or its host is gone",
    ]


def test_ranks_of_which_the_same_is_to_be_said_share_lines() -> None:
    everyone = (0, 1, 2, 3)
    found = report(
        Account().waits("world", everyone, age=10.02),
        Account().waits("world", everyone, age=11.26),
        Account(),
        Account().waits("world", everyone, age=10.5),
    )
    assert "  ranks 0, 1, 3: waits in all_reduce(), call 1 of group world [0, 1, 2, 3], for 10.0 to 11.3 s" in found
    assert "      its last in world [0, 1, 2, 3]: none so far" in found


def test_a_rank_that_answers_nothing_and_one_that_has_left() -> None:
    pair = (0, 1, 2)
    found = report(Account().waits("dp", pair), None, Account().left("has failed: ValueError: no space"))
    assert "  culprit: rank 1 does not answer, but rank 0 waits for it" in found
    assert "  culprit: rank 2 has failed: ValueError: no space, but rank 0 waits for it" in found
    assert "  rank 2: has failed: ValueError: no space" in found


def test_ranks_that_a_launcher_has_ended_are_no_culprits() -> None:
    lost = Absent("process 17 on node4", "gone")
    ended = Absent("process 18 on node4", "gone", since=True)
    found = report(Account().waits("world", (0, 1, 2)), None, None, absent={1: lost, 2: ended})
    assert [line for line in found if "culprit" in line] == [
        "  culprit: rank 1 does not answer, but rank 0 waits for it"
    ]
    assert "  rank 1: does not answer (process 17 on node4): it is gone" in found
    assert found[-1].startswith("  rank 2: does not answer (process 18 on node4): it has ended since the alarm")


def test_who_has_passed_an_operation_is_not_missing_from_it() -> None:
    """A broadcast is over for its source before anyone else has it."""
    found = report(
        Account().did("dp", (0, 1, 2), "broadcast", root="0"),
        Account().waits("dp", (0, 1, 2), "broadcast", root="0"),
        None,
    )
    assert "      missing: rank 2; there: ranks 0, 1" in found
    assert not [line for line in found if "culprit: rank 0" in line]


def test_operations_that_differ_are_found_after_one_of_them_is_over() -> None:
    found = report(
        Account().did("tp", (0, 1), shape="[3]").waits("dp", (0, 2)),
        Account().waits("tp", (0, 1), shape="[4]"),
        Account().waits("dp", (0, 2)),
    )
    assert (
        "  culprit: ranks 0, 1 are in different operations at call 1 of group tp [0, 1]: rank 0 in all_reduce(shape [3]"
        "); rank 1 in all_reduce(shape [4])"
    ) in found


def test_a_cycle() -> None:
    found = report(
        Account().waits("tp", (0, 1)),
        Account().waits("dp", (1, 2)),
        Account().waits("pp", (0, 2)),
    )
    assert "  cycle: rank 0 -> rank 1 -> rank 2 -> rank 0 (each waits for the next)" in found
    assert not [line for line in found if "culprit" in line]


def test_an_operation_behind_another_in_the_queue_has_not_begun() -> None:
    found = report(
        Account().waits("tp", (0, 1), queued=True).waits("dp", (0, 2), queued=True),
        Account().waits("dp", (1, 3), queued=True).waits("tp", (0, 1), queued=True),
        Account().waits("dp", (0, 2), queued=True).waits("pp", (2, 3), queued=True),
        Account().waits("pp", (2, 3), queued=True).waits("dp", (1, 3), queued=True),
    )
    assert "  cycle: rank 0 -> rank 1 -> rank 3 -> rank 2 -> rank 0 (each waits for the next)" in found
    assert "  rank 0: has queued all_reduce(), call 1 of group tp [0, 1], 650 s ago, which is not over" in found


def test_everyone_is_there() -> None:
    found = report(Account().waits("tp", (0, 1)), Account().waits("tp", (0, 1), error="connection reset"))
    assert found[1] == (
        "  no rank is missing from all_reduce, call 1 of group tp [0, 1]: the network or a device does not carry it "
        "out; it failed: connection reset"
    )
    assert "  rank 1: called all_reduce(), call 1 of group tp [0, 1], 650 s ago, which failed" in found
    assert "      error: connection reset" in found


def test_alone() -> None:
    found = report(None, Account().waits("tp", (0, 1)), blind="the store does not answer")
    assert found[1] == "  the store does not answer, so this is what rank 1 alone can say"
    assert found[2] == "  rank 1: waits in all_reduce(), call 1 of group tp [0, 1], for 650 s"
    assert found[3] == "      needs: rank 0"
    assert not [line for line in found if "culprit" in line or "does not answer (" in line]


def test_where_ranks_parted_is_looked_for_as_far_back_as_both_remember() -> None:
    """Rank 0 remembers from its call 1 on, rank 1 only its call 3 on."""
    first, second = Account("a"), Account("b")
    for _ in range(4):
        first.did("tp", (0, 1))
        second.did("tp", (0, 1))
    del second.recent[:2]
    found = report(first.waits("tp", (0, 1)), second)
    parted = next(line for line in found if "parted" in line)
    assert parted.startswith("  parted: at call 3 of group tp [0, 1] or before: ")
