"""One optimizer step: its passes, forward and backward, then the update. The host waits for nothing in it.

(But for bitsandbytes' optimizers other than 8-bit AdamW, which wait after each parameter. And but for float16 with any
other optimizer than torch's, whose update cannot be skipped on the GPU: there the host asks whether the gradient
overflowed, after all else has been asked for.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slothcore.models.flat_factors import FlatFactors
from slothcore.training.batches import StepPlan
from slothcore.training.config import TrainConfig
from slothcore.training.decoded import keep_decoded_layers
from slothcore.training.learner import Learner
from slothcore.training.out_of_memory import DoesNotFit, remedy, update_remedy
from slothcore.training.progress import say
from slothcore.training.run_state import generator_states, restore_generators
from slothcore.training.step_feed import PreparedStep, StepFeed


@dataclass(frozen=True)
class TooLarge:
    """A pass that did not fit into memory: its rows."""

    rows: list[int]


class OptimizerStep:
    """Runs the optimizer steps of a model.

    Attributes:
        flat: the parameters that lie end to end, if any do; their gradients then stay in its vectors.
        decoded_layers: how many layers keep decoded weights.
        skipped: whether the last update was, because its gradient overflowed, on the device; None: none ever is.
        most_tokens, most_passes: of a pass, and of a step, as steps are cut now.
    """

    def __init__(
        self, learner: Learner, config: TrainConfig, *, flat: FlatFactors | None = None, decoded_layers: int = 0
    ) -> None:
        self.model, self.parameters = learner.model, learner.parameters
        self.optimizer, self.scaler = learner.optimizer, learner.scaler
        self.config, self.flat = config, flat
        laid = {id(parameter) for parameter in (flat.parameters if flat is not None else ())}
        self._others = [parameter for parameter in self.parameters.values() if id(parameter) not in laid]
        self.decoded_layers = decoded_layers
        self.skipped: Tensor | None = None
        self.most_tokens = self.most_passes = 0
        self._clear_gradients()

    @property
    def graphs_given_up(self) -> bool:
        """Whether passes are no longer replayed because memory did not suffice; the gradients stay end to end."""
        return self.flat is not None and self.model.graphs is None

    def run(self, feed: StepFeed, factor: float) -> tuple[StepPlan, Tensor, Tensor]:
        """The next step. Gives its plan, its loss and the norm of its gradient before clipping, both on the device.

        That a merged pass fits, and decoded weights and graphs beside it, is a prediction. Where it fails, the step
        begins anew as if it had not been tried: first without the decoded weights, then with smaller passes, at last
        without graphs, whose memory only they can use; so do all that follow.

        Args:
            factor: what the learning rate of every group of parameters is multiplied by.
        Raises: DoesNotFit where nothing is left to give up for a pass; the weights are those of the step before. And
            where the update does not fit; it may then have been done in part.
        """
        step = feed.next()
        generators = generator_states(self.model.device)
        while isinstance(loss := self._passes(step), TooLarge):
            self._forget()
            step = self._smaller(feed, step, loss.rows)
            restore_generators(generators, self.model.device)
        self.most_passes = max(self.most_passes, len(step.passes))
        self.most_tokens = max(self.most_tokens, *(len(batch.input_ids) for _, batch in step.passes))
        try:
            grad_norm = self._update(factor)
        except torch.OutOfMemoryError as error:
            weights = sum(parameter.numel() for parameter in self.parameters.values())
            raise DoesNotFit(update_remedy(self.config, weights=weights)) from error
        if self.scaler.is_enabled():
            self.skipped = ~torch.isfinite(grad_norm)
        else:
            # Nothing skips a step whose gradient is no number, and it spoils the weights: 0 * NaN makes the loss tell.
            loss += 0.0 * grad_norm
        return step.plan, loss, grad_norm

    def _passes(self, step: PreparedStep) -> Tensor | TooLarge:
        """Add up the gradients of a step. Gives its loss, on the device, or the pass that did not fit."""
        total = torch.zeros((), dtype=torch.float32, device=self.model.device)
        for rows, batch in step.passes:
            try:
                loss = self.model(
                    batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, num_items=step.plan.num_targets
                ).loss
                self.scaler.scale(loss).backward()
            except torch.OutOfMemoryError:
                # What follows must not happen here: until the handler ends, the error holds the activations.
                return TooLarge(rows)
            total += loss.detach()
        return total

    def _smaller(self, feed: StepFeed, step: PreparedStep, too_many: list[int]) -> PreparedStep:
        """The step in a form that takes less memory. Raises DoesNotFit if there is none."""
        tokens = feed.cut.tokens(too_many)
        what = f"memory: a pass of {tokens:,} tokens did not fit; the step is done again"
        if self.decoded_layers:
            self.decoded_layers = 0
            keep_decoded_layers(self.model, 0)
            say(f"{what}, and from now on no decoded weights are kept")
            return step
        smaller = feed.again_smaller(too_many)
        if smaller is not None:
            say(f"{what}, and from now on a pass has at most {feed.cut.token_budget:,}")
            return smaller
        if self.model.graphs is None:
            raise DoesNotFit(remedy(self.config, bits=self.model.bits, rows=len(too_many), tokens=tokens))
        self.model.disable_graphs()
        say(f"{what}, and from now on no graphs are replayed")
        return step

    def _forget(self) -> None:
        """Make it as if the passes had not been run, but for the generators."""
        self._clear_gradients()
        self.most_tokens = self.most_passes = 0
        if self.model.device.type == "cuda":
            # Blocks of the sizes that did not fit help nobody, and the peak is to be that of the passes to come.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.model.device)

    def _update(self, factor: float) -> Tensor:
        """Clip the gradients, update the weights and clear the gradients. Gives the norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._clear_gradients()
        return grad_norm

    def _clip(self) -> Tensor:
        """Scale all gradients down to the norm that they may have. Gives the one that they had."""
        gradients = [parameter.grad for parameter in self._others if parameter.grad is not None]
        if self.flat is not None:
            # One vector for each dtype, whatever made the gradients: other parts would be summed in another order.
            self.flat.attach()
            gradients += [group.gradients_vector for group in self.flat.groups]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.max_grad_norm:
            # As torch.nn.utils.clip_grads_with_norm_, which takes parameters only.
            factor = torch.clamp(self.config.max_grad_norm / (norm + 1e-6), max=1.0)
            for alike in _by_dtype(gradients):
                torch._foreach_mul_(alike, factor)
        return norm

    def _clear_gradients(self) -> None:
        for parameter in self._others:
            parameter.grad = None
        if self.flat is not None:
            self.flat.zero_grad()


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Lists that one launch can take."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return [*lists.values()]
