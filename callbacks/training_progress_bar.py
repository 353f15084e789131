"""TrainingProgressBar: loss, tokens a second and time left; a bar on a terminal, a plain line now and then elsewhere."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress, RichProgressBarTheme
from rich.console import Console

REFRESH_SECONDS = 0.5
NEVER = float("-inf")  # not 0: a monotonic clock may count from the machine's start


class TrainingProgressBar(RichProgressBar):
    """Counts optimiser steps up to `trainer.max_steps`, from where a resumed run takes up.

    The loss is read from the device at most twice a second (Lightning's bar reads it, and so waits for it, at every batch). Where
    standard output is no terminal (a log file, CI), no bar is drawn: a line is printed every `plain_seconds` and at the last step.
    """

    def __init__(self, refresh_rate: int = 10, plain_seconds: float = 10.0, leave: bool = True) -> None:
        """Draw the bar, or print lines.

        Args:
            refresh_rate: how many times a second a terminal's bar may be redrawn; 0 shows nothing.
            plain_seconds: seconds between lines where there is no terminal.
            leave: whether the finished bar stays.
        """
        super().__init__(refresh_rate=refresh_rate, leave=leave, theme=RichProgressBarTheme(metrics_text_delimiter="  "))
        self.plain_seconds = plain_seconds
        self.is_terminal = Console().is_terminal
        self._tokens = 0
        self._tokens_per_second = 0.0
        self._rate_since = 0.0
        self._shown_at = self._line_at = NEVER
        self._first_step = self._step = 0
        self._started_at = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether a bar is drawn."""
        return super().is_enabled and self.is_terminal

    @property
    def _prints_lines(self) -> bool:
        return self._enabled and self.refresh_rate > 0 and not self.is_terminal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        super().on_train_start(trainer, pl_module)
        now = time.monotonic()
        self._first_step = self._step = trainer.global_step
        self._started_at = now
        self._tokens, self._rate_since = 0, now
        self._shown_at = self._line_at = NEVER

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the training bar; it goes on from epoch to epoch."""
        self._show_training_task(trainer)

    def _show_training_task(self, trainer: Trainer) -> None:
        if self.is_enabled and isinstance(self.progress, CustomProgress) and self.train_progress_bar_id is None:
            total = trainer.max_steps if trainer.max_steps > 0 else float("inf")
            self.train_progress_bar_id = self.progress.add_task("Training  ", total=total, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show what is new, if it is time."""
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        if trainer.global_step == self._step:  # between two micro-batches
            return
        self._step = trainer.global_step
        now = time.monotonic()
        is_last = trainer.global_step == trainer.max_steps
        if self._prints_lines and (is_last or now - self._line_at >= self.plain_seconds):
            self._line_at = now
            self._measure(now)
            print(self.line(trainer, now), flush=True)
        if self.is_enabled and (is_last or now - self._shown_at >= REFRESH_SECONDS):
            self._shown_at = now
            self._measure(now)
            self._show_training_task(trainer)
            self._update(self.train_progress_bar_id, trainer.global_step, hard=is_last)
            self._update_metrics(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line with the validation's losses, the one before the first step too, where no bar can show them."""
        super().on_validation_end(trainer, pl_module)
        losses = {tag: value for tag, value in getattr(pl_module, "last_validation", {}).items() if tag.endswith("/loss")}
        if self._prints_lines and trainer.state.fn == "fit" and losses:
            print(
                f"validation at step {trainer.global_step}: " + ", ".join(f"{tag} {value:.3f}" for tag, value in losses.items()), flush=True
            )

    def _measure(self, now: float) -> None:
        if now > self._rate_since:
            self._tokens_per_second = self._tokens / (now - self._rate_since)
        self._tokens, self._rate_since = 0, now

    def line(self, trainer: Trainer, now: float) -> str:
        """One line: step, loss, tokens a second since the line before, time left at the mean pace of this run."""
        done = trainer.global_step - self._first_step
        parts = [f"step {trainer.global_step}" + (f"/{trainer.max_steps}" if trainer.max_steps > 0 else "")]
        parts += [f"{name} {value}" for name, value in self.get_metrics(trainer, trainer.lightning_module).items()]
        if trainer.max_steps > 0 and done:
            seconds = (now - self._started_at) / done * (trainer.max_steps - trainer.global_step)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(parts)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss (and the latest validation loss) and tokens a second, as text."""
        metrics = {"loss": trainer.callback_metrics.get("train/loss"), "val loss": trainer.callback_metrics.get("val/loss")}
        shown: dict[str, Any] = {name: f"{float(value):.3f}" for name, value in metrics.items() if value is not None}
        return shown | {"tokens/s": f"{self._tokens_per_second:,.0f}"}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the bar counts steps."""
