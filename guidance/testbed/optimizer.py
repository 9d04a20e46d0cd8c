"""AdamW, or Muon for the hidden matrices beside it, as one optimizer with a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW on all parameters, or Muon (Jordan et al. 2024) on the hidden matrices and AdamW on the rest.

    Args:
        params: The trained parameters by name; their memory must stay where it is.
        kind: "adamw" or "muon".
        lr: Learning rate; Muon's update is scaled to AdamW's size, so it serves both.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, params: dict[str, nn.Parameter], kind: str, lr: float, weight_decay: float) -> None:
        def is_hidden(name: str, p: nn.Parameter) -> bool:
            ends = name.startswith(("conv_in", "conv_out"))
            return kind == "muon" and p.ndim >= 2 and not ends and min(p.flatten(1).shape) >= 16

        # torch's Muon takes matrices only: each is a view of the parameter's own memory
        self._matrices = {
            n: (p, nn.Parameter(p.detach().view(len(p), -1))) for n, p in params.items() if is_hidden(n, p)
        }
        self.state_of = {n: self._matrices[n][1] if n in self._matrices else p for n, p in params.items()}
        rest = [p for n, p in params.items() if n not in self._matrices]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
        ]
        if self._matrices:
            flat = [m for _, m in self._matrices.values()]
            self.parts.append(
                torch.optim.Muon(flat, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, lr: float) -> None:
        """One step at this learning rate, from the gradients of the model's parameters."""
        for p, matrix in self._matrices.values():
            matrix.grad = None if p.grad is None else p.grad.view(matrix.shape)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as ``{"KEY.parameter": tensor}``, step counts left out."""
        states = {n: next(o.state[p] for o in self.parts if p in o.state) for n, p in self.state_of.items()}
        return {f"optimizer.{k}.{n}": v for n, s in states.items() for k, v in s.items() if k != "step"}

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take up what :meth:`tensors` gave after ``step`` steps."""
        for n, p in self.state_of.items():
            part = self.parts[1 if n in self._matrices else 0]
            keys = ("momentum_buffer",) if n in self._matrices else ("exp_avg", "exp_avg_sq")
            state = {k: tensors[f"optimizer.{k}.{n}"].to(p.device) for k in keys}
            part.state[p] = state if n in self._matrices else {"step": torch.tensor(float(step)), **state}
