"""Experts as linears of their own.

transformers keeps the experts of a layer in three-dimensional parameters and multiplies them in groups, past every
hook. ``separate_experts`` puts modules in their place that compute the same and whose linears can be observed, scored
and quantized one by one, under the names that vLLM and llm-compressor use: ``experts.3.gate_proj``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Names of the three-dimensional parameters: [experts, 2 * width, hidden] and [experts, hidden, width].
GATE_UP, DOWN = "gate_up_proj", "down_proj"


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``.

    Attributes:
        tokens: [n] int64, which tokens of the layer's last call it computed, in their order.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        width = gate_up.shape[0] // 2
        self.gate_proj = _linear(gate_up[:width])
        self.up_proj = _linear(gate_up[width:])
        self.down_proj = _linear(down)
        self._activation = activation
        self.tokens = torch.empty(0, dtype=torch.int64)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Output [n, hidden] for ``hidden_states`` [n, hidden]."""
        activated: Tensor = self._activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        output: Tensor = self.down_proj(activated)
        return output


class SeparateExperts(nn.ModuleList):
    """The experts of a layer, called as transformers calls its own module of experts.

    Attributes:
        transposed: whether transformers keeps their weights as [experts, in, out] and not as [experts, out, in].
        scales_inputs: whether the router's weights multiply the experts' inputs and not their outputs.
    """

    transposed = False
    scales_inputs = False

    def __init__(self, *fused: Any) -> None:
        """Takes the weights of transformers' modules; they share their memory unless these keep them transposed."""
        super().__init__()
        for each in fused:
            gate_up, down = getattr(each, GATE_UP), getattr(each, DOWN)
            if self.transposed:
                gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
            self.extend(Expert(gate_up[number], down[number], each.act_fn) for number in range(len(down)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index, top_k_weights: [tokens, k], numbers and weights of the experts.
        """
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            expert.tokens, place = torch.where(top_k_index == number)
            if len(expert.tokens):
                computed = expert(hidden_states[expert.tokens]) * top_k_weights[expert.tokens, place, None]
                output.index_add_(0, expert.tokens, computed.to(output.dtype))
        return output


class ScaledInputExperts(SeparateExperts):
    """Experts whose input the router scales (Llama 4)."""

    transposed = True
    scales_inputs = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, scales: Tensor) -> Tensor:
        """Sum of the outputs of each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], numbers of the experts.
            scales: [tokens, experts], the router's weights for all experts, those without the token too.
        """
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            expert.tokens = torch.where(top_k_index == number)[0]
            if len(expert.tokens):
                scaled = hidden_states[expert.tokens] * scales[expert.tokens, number, None]
                output.index_add_(0, expert.tokens, expert(scaled))
        return output


class ScaledInputMixture(nn.Module):
    """Router, experts whose input it scales, and a shared expert, in place of ``Llama4TextMoe``.

    transformers runs every expert on all tokens, most of them scaled to zero.
    """

    def __init__(self, mixture: Any) -> None:
        super().__init__()
        self.router, self.shared_expert = mixture.router, mixture.shared_expert
        self.experts = ScaledInputExperts(mixture.experts)
        self._top_k = mixture.top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Output [tokens, hidden] for ``hidden_states`` [..., hidden], and the router's logits [tokens, experts]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, logits = self.router(tokens)
        scales = torch.sigmoid(logits.float()).to(logits.dtype)
        routed = self.experts(tokens, torch.topk(logits, self._top_k, dim=1).indices, scales)
        return self.shared_expert(tokens) + routed, logits


def _isolated_mixture(mixture: Any) -> nn.Module:
    """A mixture of experts for text and one for images, ``Ernie4_5_VLMoeMoeBlock``, with all experts in one module.

    The experts for images come after those for text, as checkpoints number them. A decoder layer asks for the class.
    """

    class IsolatedMixture(type(mixture)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """Output for ``hidden_states`` [batch, time, hidden] and the routers' logits [tokens, experts].

            Args:
                moe_mm_token_type_ids: [batch, time], 0 for the tokens of text.
            """
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            logits, weights, routes = self.text_moe.gate(tokens)
            if moe_mm_token_type_ids is not None:
                of_images = self.vision_moe.gate(tokens)
                is_image = moe_mm_token_type_ids.reshape(-1, 1).bool()
                logits, weights = (
                    torch.where(is_image, of_images[at], each) for at, each in ((0, logits), (1, weights))
                )
                routes = torch.where(is_image, of_images[2] + self.num_experts, routes)
            output = self.experts(tokens, routes, weights).view(hidden_states.shape)
            if self.shared_experts is not None:
                output = output + self.shared_experts(hidden_states)
            return output, logits

    isolated = IsolatedMixture.__new__(IsolatedMixture)
    nn.Module.__init__(isolated)
    isolated.num_experts, isolated.shared_experts = mixture.num_experts, mixture.shared_experts
    isolated.text_moe, isolated.vision_moe = nn.Module(), nn.Module()
    isolated.text_moe.gate, isolated.vision_moe.gate = mixture.text_moe.gate, mixture.vision_moe.gate
    isolated.experts = SeparateExperts(mixture.text_moe.experts, mixture.vision_moe.experts)
    return isolated


#: Classes of transformers whose call has to change with that of their experts -> what takes their place.
_MIXTURES: dict[str, Callable[[Any], nn.Module]] = {
    "Llama4TextMoe": ScaledInputMixture,
    "Ernie4_5_VLMoeMoeBlock": _isolated_mixture,
}


def separate_experts(model: nn.Module) -> None:
    """Replace every module of experts that transformers keeps in three-dimensional parameters, in place.

    Modules with interleaved weights, biases or norms stay as they are.
    """
    mixtures = [(path, module) for path, module in model.named_modules() if type(module).__name__ in _MIXTURES]
    for path, module in mixtures:
        _replace(model, path, _MIXTURES[type(module).__name__](module))
    for path, module in [(path, module) for path, module in model.named_modules() if _is_fused(module)]:
        _replace(model, path, SeparateExperts(module))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _is_fused(module: Any) -> bool:
    own = dict(module.named_parameters(recurse=False))
    plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    unusual = ("is_transposed", "has_bias", "has_post_expert_norm")
    return own.keys() == {GATE_UP, DOWN} and plain and not any(getattr(module, name, False) for name in unusual)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
