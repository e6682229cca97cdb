from __future__ import annotations

import random
import unicodedata

import pytest

from megalm.cli.show_prepared import cleaning_from
from megalm.cli.show_progress import ProgressLines
from megalm.data.cleaning.cleaner import Cleaner, Cleaning, check_cleaning
from megalm.data.cleaning.pii import Scrubber
from megalm.data.cleaning.repetition import repetition
from megalm.data.prepare import prepare
from megalm.data.store import TokenStore
from megalm.errors import DataError
from megalm_plugins.tokenizers.byte import ByteTokenizer


def test_nothing_happens_unasked():
    texts = ["e\u0301 \x00\u202e a@b.org", " ", "x" * 10_000]
    cleaner = Cleaner(Cleaning())
    assert cleaner.apply(texts) == texts
    assert not cleaner.removed


def test_mending_and_length():
    cleaner = Cleaner(Cleaning(normalize="NFC", strip_control=True, min_characters=3, max_characters=9))
    found = cleaner.apply(["e\u0301\u0000t\u200be\u0301\n\t", "ab", "\x07\x08", "x" * 10, "\u202eabc", "👩\u200d👩 e"])
    assert found == ["\u00e9t\u00e9\n\t", "abc", "👩\u200d👩 e"]
    assert cleaner.removed == {"too short": 1, "nothing left": 1, "too long": 1}
    wide = Cleaner(Cleaning(normalize="NFKC"))
    text = "\ufb01 \u2460 \uff21"
    assert wide.apply([text]) == [unicodedata.normalize("NFKC", text)]


def test_repetition_is_measured_in_lines_and_runs():
    rng = random.Random(1)
    prose = " ".join(f"w{rng.randrange(10**6)}" for _ in range(400))
    menu = "\n".join(["Home | About | Contact"] * 30)
    spin = "buy this now and get more " * 50
    shares = repetition([prose, menu, spin, "short", "", "春眠不觉晓 处处闻啼鸟 夜来风雨声 花落知多少"])
    assert shares[0] == shares[3] == shares[4] == shares[5] == 0
    assert shares[1] == pytest.approx(29 / 30)
    assert shares[2] > 0.95
    cleaner = Cleaner(Cleaning(max_repetition=0.5))
    assert cleaner.apply([prose, menu, spin]) == [prose]
    assert cleaner.removed == {"repetition": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail jane.doe+x@mail.example.co.uk, or not@ or @home.", "Mail <EMAIL>, or not@ or @home."),
        ("host 192.168.0.254 v1.2.3.4.5 999.1.1.1 127.0.0.1", "host <IP> v1.2.3.4.5 999.1.1.1 127.0.0.1"),
        ("at 2001:db8::8a2e:370:7334 on 12:30:45", "at <IP> on 12:30:45"),
        ("call +44 20 7946 0958 or (030) 123-4567 or 555-867-5309.", "call <PHONE> or <PHONE> or <PHONE>."),
        ("on 2024-05-17, pages 100-120, 3.14159, 1 000 000", "on 2024-05-17, pages 100-120, 3.14159, 1 000 000"),
        ("card 4111 1111 1111 1111 not 4111 1111 1111 1112", "card <CARD> not 4111 1111 1111 1112"),
        ("pay DE89 3704 0044 0532 0130 00 not DE89 3704 0044 0532 0130 02", None),
        ("GB82WEST12345698765432", "<IBAN>"),
    ],
)
def test_personal_data(text, expected):
    found = Scrubber(["email", "ip", "phone", "card", "iban"]).apply(text)
    assert found == (expected or "pay <IBAN> not DE89 3704 0044 0532 0130 02")


def test_only_the_kinds_asked_for_are_replaced():
    scrubber = Scrubber(["email"])
    assert scrubber.apply("a@b.org 10.0.0.1 c@d.org") == "<EMAIL> 10.0.0.1 <EMAIL>"
    assert scrubber.counts == {"email": 2}


def test_long_lines_of_digits_and_letters_take_linear_time():
    scrubber = Scrubber(["email", "ip", "phone", "card", "iban"])
    for text in (
        "1" * 200_000,
        "a" * 200_000,
        "1 " * 100_000,
        "a." * 100_000,
        "1:" * 100_000,
        "AB12" * 50_000,
        "a@" * 99_999,
    ):
        scrubber.apply(text)


def test_languages():
    pytest.importorskip("py3langid")
    texts = [
        "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun.",
        "话说天下大势分久必合合久必分周末七国分争并入于秦",
        "Der schnelle braune Fuchs springt über den faulen Hund und schläft dann in der Sonne.",
    ]
    cleaner = Cleaner(Cleaning(languages=("en", "zh")))
    assert cleaner.apply(texts) == texts[:2]
    assert cleaner.removed == {"language": 1}
    with pytest.raises(DataError, match="unknown language xx"):
        check_cleaning(Cleaning(languages=("xx",)))


def test_what_was_done_is_in_the_manifest(tmp_path, text_file):
    path = text_file(
        "Write to a@b.org today, please.\n\nno\n\nIt is a nice day, isn't it?\n\nIt is a nice day, isn't it?"
    )
    cleaning = Cleaning(min_characters=5, scrub=("email", "ip"), dedup="exact")
    manifest = prepare([path], ByteTokenizer(), tmp_path / "s", component="byte", validation=0, cleaning=cleaning)
    assert manifest.preparation.removed == {"too short": 1, "exact duplicate": 1}
    assert manifest.preparation.scrubbed == {"email": 1}
    assert manifest.options["scrub"] == "email,ip"
    assert manifest.options["min_characters"] == 5.0
    assert manifest.sources[0].documents == 4
    assert TokenStore.open(tmp_path / "s", "train").num_documents == 2
    with pytest.raises(DataError, match=r"no document is left: 4 removed or skipped \(too short\)"):
        prepare([path], ByteTokenizer(), tmp_path / "t", component="byte", cleaning=Cleaning(min_characters=99))


def test_wrong_options_are_named():
    with pytest.raises(DataError, match="--scrub name: expected kinds among email"):
        check_cleaning(Cleaning(scrub=("name",)))
    with pytest.raises(DataError, match=r"--max-repetition 1\.5"):
        cleaning_from(max_repetition=1.5)
    with pytest.raises(DataError, match="--dedup some"):
        cleaning_from(dedup="some")


def test_lines_of_progress_tell_speed_and_time_left(capsys):
    now = [0.0]
    lines = ProgressLines("preparing", lambda: now[0])
    lines(50_000_000, 200_000_000)  # an earlier run's
    now[0] = 29.0
    lines(79_000_000, 200_000_000)
    now[0] = 50.0
    lines(100_000_000, 200_000_000)
    expected = "preparing: 100.0 of 200.0 MB, 1.00 MB/s, 100 s left\n"
    assert capsys.readouterr().err == expected
