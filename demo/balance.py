"""A loss that keeps the experts of a model equally busy while it is trained."""

import torch
import torch.nn.functional as F
from torch import nn


class Balance:
    """Loss of the routers of a model in its last forward pass: 1 if all experts are equally busy, else more.

    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, equation 4; the mean over layers.
    """

    def __init__(self, network: nn.Module, active: int) -> None:
        """``active``: experts of every token."""
        self._active = active
        self._logits: dict[str, torch.Tensor] = {}
        for name, module in network.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _module, _args, out, name=name: self._keep(name, out[0]))

    def _keep(self, name: str, logits: torch.Tensor) -> None:
        self._logits[name] = logits

    def loss(self) -> torch.Tensor:
        """Scalar, in fp32."""
        losses = []
        for logits in self._logits.values():
            chances = logits.float().softmax(-1)
            experts = chances.shape[-1]
            busy = F.one_hot(chances.topk(self._active).indices, experts).float().sum(1).mean(0) / self._active
            losses.append(experts * (busy * chances.mean(0)).sum())
        return torch.stack(losses).mean()
