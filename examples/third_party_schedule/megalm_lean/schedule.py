"""A microbatch enters every six moments, and each rank repeats one beat of six actions.

Stages lie in a V, so a microbatch passes each rank four times: F down, F up, B up, B down. Because nothing ever waits,
a rank holds few activations; because nothing hurries, the pipeline fills and drains slowly. The idea is that of Qi et
al., Pipeline Parallelism with Controllable Memory, 2024.
"""

from megalm.api import Action, ActionKind, PipelineOrder, PipelineSchedule, v_placement


class LeanV(PipelineSchedule):
    """Two stages a rank, F = B = W."""

    reference = "examples/third_party_schedule, after Qi et al., Pipeline Parallelism with Controllable Memory, 2024"
    default_virtual = 2

    def objection(self, shape):
        return None if shape.virtual == 2 else "its stages lie in a V of two a rank"

    def build(self, shape):
        p = shape.ranks
        back = 2 * p + (2 if p % 3 == 0 else 0)  # the moment of the first B; a multiple of six would clash with F
        ranks = []
        for rank in range(p):
            down, up = rank, 2 * p - 1 - rank
            beat = [(down, "F", down), (up, "F", up), (back + down, "B", up), (back + up, "B", down)]
            free = set(range(6)) - {moment % 6 for moment, _, _ in beat}
            for after, _, stage in beat[2:]:
                moment = next(t for t in range(after + 1, after + 7) if t % 6 in free)
                free.remove(moment % 6)
                beat.append((moment, "W", stage))
            moments = sorted((6 * m + t, kind, stage, m) for m in range(shape.microbatches) for t, kind, stage in beat)
            ranks.append(tuple(Action(ActionKind(kind), stage, m) for _, kind, stage, m in moments))
        return PipelineOrder(v_placement(p), tuple(ranks), shape.microbatches)
