"""How a fixed global batch is spread over workers: rows per worker, micro-batch, accumulation, and what is wasted."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """Derived from the global batch and the world size; never configured.

    Every worker runs `accumulation` micro-batches of `micro_batch` rows. Rows beyond its share carry weight 0.
    """

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int

    @property
    def rows_per_rank(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def wasted_rows(self) -> int:
        """Rows of weight 0 computed per step, over all workers."""
        return self.rows_per_rank * self.world_size - self.global_batch

    @property
    def loss_scale(self) -> float:
        """Factor on a micro-batch's sum of row losses, so that DeepSpeed's mean over workers and micro-batches is the
        mean over the global batch: (1/W) sum_ranks (1/A) sum_micro (W A / B) sum_rows loss = (1/B) sum loss."""
        return self.world_size * self.accumulation / self.global_batch

    def describe(self) -> str:
        text = (
            f"global batch {self.global_batch} = {self.world_size} worker(s) x {self.accumulation} micro-batch(es) "
            f"x {self.micro_batch} row(s)"
        )
        if self.wasted_rows:
            share = self.wasted_rows / (self.rows_per_rank * self.world_size)
            text += f"; {self.wasted_rows} filler row(s) per step, {share:.0%} of the work"
        return text


def make_plan(*, global_batch: int, world_size: int, micro_batch: int) -> BatchPlan:
    """Spread `global_batch` rows over `world_size` workers in micro-batches of at most `micro_batch` (0: one)."""
    if world_size > global_batch:
        raise ConfigError(
            f"{world_size} workers exceed train.global_batch={global_batch}; use fewer workers or raise it"
        )
    share = -(-global_batch // world_size)
    size = share if micro_batch == 0 else min(micro_batch, share)
    accumulation = -(-share // size)
    # The smallest micro-batch that needs no more micro-batches wastes the fewest rows.
    size = -(-share // accumulation)
    return BatchPlan(global_batch=global_batch, world_size=world_size, micro_batch=size, accumulation=accumulation)
