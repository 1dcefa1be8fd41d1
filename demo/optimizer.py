"""Muon for matrices and AdamW for other parameters, with fp32 masters of a bf16 model, data-parallel over processes.

Muon (Jordan et al., 2024) replaces the momentum of a weight matrix by the nearest orthogonal matrix, computed by a few
Newton-Schulz steps. Matrices are distributed over the ranks, and each rank orthogonalises its part.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

logger = logging.getLogger(__name__)


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """A matrix of the same shape with singular values near 1 (quintic Newton-Schulz; in bf16 on a GPU).

    Of the weights of experts [experts, out, in], every expert's matrix is taken by itself.

    On a CPU it uses float32, because many CPUs emulate bf16 and are then many times slower.
    """
    if matrix.dim() == 3:
        return torch.stack([orthogonalise(each, steps) for each in matrix])
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def sum_over_ranks(tensors: list[torch.Tensor]) -> None:
    """All-reduce fp32 tensors in place, in one message."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class Optimizer:
    """Optimizer of the parameters of ``model`` that require gradients, and of ``heads``.

    Muon updates weights with two or more dimensions, except embeddings and the language model head. Adam updates
    these, gains, biases and ``heads``.
    """

    def __init__(
        self, model: nn.Module, heads: nn.Module | None = None, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        extra = list(heads.parameters()) if heads is not None else []
        self.params = [parameter for _, parameter in named] + extra
        self.masters = [parameter.detach().float().clone() for parameter in self.params]
        plain = ("embed_tokens", "lm_head", "position_embedding", "pos_embed")
        self.is_matrix = [p.ndim >= 2 and not any(part in n for part in plain) for n, p in named] + [False] * len(extra)
        self.first = [torch.zeros_like(master) for master in self.masters]
        self.second = [
            torch.zeros(0) if matrix else torch.zeros_like(master)
            for matrix, master in zip(self.is_matrix, self.masters, strict=True)
        ]
        self.momentum, self.weight_decay, self.steps = momentum, weight_decay, 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    @torch.no_grad()
    def step(self, muon_lr: float, adam_lr: float) -> None:
        """Update all parameters with the mean gradient over ranks, then clear the gradients."""
        self.steps += 1
        grads = [p.grad.float() if p.grad is not None else torch.zeros(p.shape) for p in self.params]
        sum_over_ranks(grads)
        updates = [
            self._matrix_update(i, grad, muon_lr) if matrix else self._adam_update(i, grad, adam_lr)
            for i, (grad, matrix) in enumerate(zip(grads, self.is_matrix, strict=True))
        ]
        sum_over_ranks([update for update, matrix in zip(updates, self.is_matrix, strict=True) if matrix])
        for i, (parameter, master, update) in enumerate(zip(self.params, self.masters, updates, strict=True)):
            lr = muon_lr if self.is_matrix[i] else adam_lr
            if self.is_matrix[i]:
                master.mul_(1 - lr * self.weight_decay)
            master.sub_(update)
            parameter.copy_(master)
            parameter.grad = None

    def _matrix_update(self, i: int, grad: torch.Tensor, lr: float) -> torch.Tensor:
        """Muon's update of matrix i; zero on the ranks that do not own it."""
        self.first[i].mul_(self.momentum).add_(grad / self.world, alpha=1 - self.momentum)
        if i % self.world != self.rank:
            return torch.zeros_like(grad)
        blended = grad / self.world * (1 - self.momentum) + self.first[i] * self.momentum
        flat = blended if blended.dim() == 3 else blended.flatten(1)
        scale = max(1.0, flat.shape[-2] / flat.shape[-1]) ** 0.5
        return (orthogonalise(flat) * (lr * scale)).view_as(grad)

    def _adam_update(
        self, i: int, grad: torch.Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.98)
    ) -> torch.Tensor:
        grad = grad / self.world
        self.first[i].lerp_(grad, 1 - betas[0])
        self.second[i].lerp_(grad.square(), 1 - betas[1])
        mean = self.first[i] / (1 - betas[0] ** self.steps)
        square = self.second[i] / (1 - betas[1] ** self.steps)
        return lr * mean / (square.sqrt() + 1e-8)

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self.masters, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("masters", "first", "second"):
            for tensor, saved in zip(getattr(self, name), state[name], strict=True):
                tensor.copy_(saved)
        self.steps = state["steps"]
        for parameter, master in zip(self.params, self.masters, strict=True):
            parameter.copy_(master)
