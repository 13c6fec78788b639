"""Optimizers that the studies compare with and that neither Pion nor Megatron has.

`study_training` takes their flags out before Megatron sees the others. All of them train with
``--optimizer muon``: Adam has the embedding, the output layer and the norms.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pion_dist import PionConfig
from pion_dist.classify import Rotated, classify
from pion_dist.matrices import MatrixView

Weights = list[tuple[torch.nn.Parameter, MatrixView]]


def take_flags(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the studies' own flags from Megatron's.

    Args:
        flags: all of a training's.

    Returns:
        The values of the studies' flags, and Megatron's flags in their order.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--study-fixed-norm", action="store_true", dest="fixed_norm")
    parser.add_argument("--study-iso", action="store_true", dest="iso")
    # The matrices' weight decay, as a multiple of --weight-decay. Megatron's decay follows --lr,
    # which is Adam's here: without this, the matrices' decay would grow with Adam's rate.
    parser.add_argument("--study-decay-mult", type=float, dest="decay_mult")
    return parser.parse_known_args(list(flags))


def weights(model: Sequence[torch.nn.Module], config: PionConfig) -> Weights:
    """The weights that hold matrices, and how each is cut into them."""
    from megatron_patches.parameters import named_parameters  # after Megatron is patched

    decisions = ((p, classify(info, config)) for info, p in named_parameters(model))
    return [(p, decision.view) for p, decision in decisions if isinstance(decision, Rotated)]


def master(p: torch.nn.Parameter) -> Tensor:
    """The float32 copy that the optimizer moves, or the parameter where there is none."""
    main = getattr(p, "main_param", None)
    return p.detach() if main is None else main.detach().view(p.shape)


def set_decay(optimizer: Any, mult: float) -> None:
    """Multiply the weight decay of the groups that Adam does not have (modified in place)."""
    from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(chained.optimizer, TensorParallelMuon):
            for group in chained.param_groups:
                group["wd_mult"] *= mult
                group["weight_decay"] *= mult


class FixedNorm:
    """Give every matrix its initial Frobenius norm back after each step.

    This is what MuonSphere (arXiv 2601.08393) and Hyperball (arXiv 2606.16899) have in common with
    a fixed spectrum; their other choices are not followed. Matrices are those that Pion moves: Q, K
    and V, gate and up by themselves.
    """

    def __init__(self, held: Weights) -> None:
        self._held = held
        self._norms = [self._norms_of(p, view) for p, view in held]

    @staticmethod
    def _norms_of(p: torch.nn.Parameter, view: MatrixView) -> dict[str, Tensor]:
        # In float64: the norm of a large matrix in float32 would drift over the steps.
        parts = view.split(master(p)).items()
        return {name: torch.linalg.matrix_norm(m.double()) for name, m in parts}

    @torch.no_grad()
    def restore(self) -> None:
        """Rescale the float32 masters, and copy them to the model (modified in place)."""
        for (p, view), norms in zip(self._held, self._norms, strict=True):
            weight, now = master(p), self._norms_of(p, view)
            scaled = {
                name: matrices * (norms[name] / now[name]).to(matrices.dtype)[:, None, None]
                for name, matrices in view.split(weight).items()
            }
            view.merge(scaled, weight)
            if weight.data_ptr() != p.data_ptr():
                p.copy_(weight)

    def follow(self, optimizer: Any) -> None:
        """Have Megatron's optimizer restore the norms at the end of each step."""
        step = optimizer.step

        def restored_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.restore()
            return result

        optimizer.step = restored_step


class Iso(torch.optim.Optimizer):
    """Move the singular frames of W = U diag(s) Vᵀ by gradient descent, with s fixed.

    ISO is of arXiv 2607.19331 and NVIDIA's Emerging-Optimizers, where it is made for RLVR. Followed
    from the latter's main branch of August 2026: one singular value decomposition at the start,
    factors in float32, gradients (G V) diag(s) and (Gᵀ U) diag(s), heavy-ball momentum 0.9 without
    dampening, U and V each put back by a QR decomposition of U − lr · momentum whose R has a
    positive diagonal, no weight decay, no normalisation of the step.

    Guesses: the momentum is projected to the tangent space at the factor before it is used (the
    repository retracts it as it is, so that QR drops the upper triangle of UᵀM, and the step need
    not descend; the paper could not be read), fused weights are cut into the matrices that Pion
    moves, and in pretraining it begins from the same weights as Pion.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        held: Weights,
        momentum: float = 0.9,
        times_adams: float = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._held, self._times = held, times_adams
        self._views: dict[int, MatrixView] = {}

    def _view(self, p: Tensor) -> MatrixView:
        # Float32 masters take the parameters' places in the groups after construction.
        if not self._views:
            for param, view in self._held:
                self._views[id(param)] = self._views[id(getattr(param, "main_param", param))] = view
        return self._views[id(p)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every weight that has a gradient (modified in place)."""
        for group in self.param_groups:
            lr = group["lr"] * self._times
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, self._view(p), lr, group["momentum"])

    def _move(self, p: Tensor, view: MatrixView, lr: float, momentum: float) -> None:
        state = self.state[p]
        if not state:
            state.update({name: _factors(m.float()) for name, m in view.split(p).items()})
        moved = {}
        for name, g_Bmn in view.split(p.grad.float()).items():
            u_Bmr, s_Br, v_Bnr, m_u, m_v = (state[name][key] for key in ("u", "s", "v", "mu", "mv"))
            m_u.mul_(momentum).add_(g_Bmn @ v_Bnr * s_Br[:, None])
            m_v.mul_(momentum).add_(g_Bmn.mT @ u_Bmr * s_Br[:, None])
            state[name]["u"] = u_Bmr = _retracted(u_Bmr, lr * m_u)
            state[name]["v"] = v_Bnr = _retracted(v_Bnr, lr * m_v)
            moved[name] = u_Bmr * s_Br[:, None] @ v_Bnr.mT
        view.merge(moved, p)


def _factors(w_Bmn: Tensor) -> dict[str, Tensor]:
    u_Bmr, s_Br, vt_Brn = torch.linalg.svd(w_Bmn, full_matrices=False)
    v_Bnr = vt_Brn.mT.contiguous()
    zeros = {"mu": torch.zeros_like(u_Bmr), "mv": torch.zeros_like(v_Bnr)}
    return {"u": u_Bmr, "s": s_Br, "v": v_Bnr, **zeros}


def _retracted(u_Bmr: Tensor, step_Bmr: Tensor) -> Tensor:
    """The frame after a step against ``step_Bmr``, of which the tangent part counts."""
    product = u_Bmr.mT @ step_Bmr
    tangent = step_Bmr - u_Bmr @ (product + product.mT) / 2
    q_Bmr, r_Brr = torch.linalg.qr(u_Bmr - tangent)
    signs = torch.where(r_Brr.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q_Bmr * signs[:, None]


def use_iso() -> None:
    """Have ``--optimizer muon`` train with ISO, in this process.

    ``--muon-extra-scale-factor`` says how many times Adam's learning rate ISO's is.
    """
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
    from megatron.training import get_args

    from megatron_patches.arguments import pion_config

    def options(config: Any, model_chunks: Any, pg_collection: Any) -> dict[str, Any]:
        held = weights(model_chunks, pion_config(get_args()))
        return {"lr": config.lr, "times_adams": config.muon_extra_scale_factor, "held": held}

    entry = _EMERGING_OPTIMIZERS["muon"]
    entry.optimizer_cls, entry.config_to_kwargs = Iso, options
    entry.init_state_fn = _state_is_lazy


def _state_is_lazy(optimizer: Any, config: Any = None) -> None:
    """ISO makes its state at its first step; studies save none."""
