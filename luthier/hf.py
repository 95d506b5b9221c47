"""One callback for transformers.Trainer: schedules advance, and the chain is saved beside every checkpoint."""

from pathlib import Path

from transformers import TrainerCallback

from .attach import Tuned


class LuthierCallback(TrainerCallback):
    """`Trainer(model=tuned, ..., callbacks=[LuthierCallback()])`. Extra loss terms reach the Trainer through tuned's own loss."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.tuned = _tuned(model)
        self.tuned.total_steps = state.max_steps

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.tuned.step(optimizer)                          # after the step, before zero_grad: the gradients are still there

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.tuned.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "luthier")


def _tuned(model):
    while not isinstance(model, Tuned) and hasattr(model, "module"):
        model = model.module
    return model
