"""What the policy's step needs of the teachers, in one pass over their logits.

Three barriers: the normalisers, then the TVD (which needs them), then log Z* (which needs alpha). A chunk's logits stay
in memory for all three, so they are made once and the barriers are entered for every chunk.

Shapes: T tokens, C tokens of one chunk, V true vocabulary entries of this shard, N parts or ranks, K words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_aligndistil.kernels.backends.backend import Backend, HeadProduct, TargetScalars
from megatron_aligndistil.kernels.extrapolated_kl.values import Extrapolation, TeacherScalars
from megatron_aligndistil.kernels.partials import MergedSoftmax, gather_partials, sum_over_ranks
from megatron_aligndistil.kernels.settings import KernelSettings, Size, Tiling, device_type, slices


class TeacherPass:
    """Both teachers' logits, chunk by chunk."""

    def __init__(
        self, backend: Backend, d: HeadProduct, r: HeadProduct, settings: KernelSettings, group: ProcessGroup | None
    ) -> None:
        self.backend, self.d, self.r, self.group = backend, d, r, group
        self.tokens, self.width = d.hidden_TH.shape[0], d.weight_VH.shape[0]
        size = Size(self.tokens, d.padded_columns, device_type(d.hidden_TH), 2, 2, 0, d.dtype.itemsize)
        self.tiling = Tiling.resident(settings, size)
        self.columns = list(slices(self.width, self.tiling.tile_columns)) or [slice(0, 0)]

    def scalars(self, extrapolation: Extrapolation) -> TeacherScalars:
        """Of all tokens."""
        scalars_KT = self.d.hidden_TH.new_empty((5, self.tokens), dtype=self.d.dtype)
        for rows in slices(self.tokens, self.tiling.chunk_tokens):
            scalars_KT[:, rows] = self._of_chunk(rows, extrapolation)
        return TeacherScalars(*scalars_KT.unbind(0))

    def _of_chunk(self, rows: slice, extrapolation: Extrapolation) -> Tensor:
        """(log Z_d, log Z_r, TVD, alpha, log Z*), [5, C]."""
        d_CV, r_CV = (p.empty(rows.stop - rows.start, self.width, p.dtype) for p in (self.d, self.r))
        parts: list[Tensor] = []
        for columns in self.columns:
            self.d.logits(rows, columns, d_CV[:, columns])
            self.r.logits(rows, columns, r_CV[:, columns])
            sums = (self.backend.softmax_sums(x_CV[:, columns]) for x_CV in (d_CV, r_CV))
            parts.append(torch.cat(tuple(sums), 1))
        max_KC, sum_KC = self._softmaxes(torch.cat(parts))
        softmax_d, softmax_r = (max_KC[0], sum_KC[0]), (max_KC[1], sum_KC[1])

        tvd_C = sum(
            self.backend.total_variation(d_CV[:, columns], r_CV[:, columns], softmax_d, softmax_r).sum(0)
            for columns in self.columns
        )
        assert isinstance(tvd_C, Tensor)
        tvd_C = sum_over_ranks(tvd_C, self.group)[0]
        alpha_C = extrapolation.alpha_of(tvd_C)
        log_z_d_C, log_z_r_C = max_KC + sum_KC.log()
        scalars = TargetScalars(log_z_d_C, log_z_r_C, alpha_C)
        parts = [self.backend.target_sums(d_CV[:, columns], r_CV[:, columns], scalars) for columns in self.columns]
        (max_C,), (sum_C,) = self._softmaxes(torch.cat(parts))
        log_z_star_C = max_C + sum_C.log()
        return torch.stack((log_z_d_C, log_z_r_C, tvd_C, alpha_C, log_z_star_C))

    def _softmaxes(self, words_NKC: Tensor) -> tuple[Tensor, Tensor]:
        """(max, sum) of each (m, s) among the words, [K / 2, C], over parts and then over ranks, by one collective."""
        own = MergedSoftmax.of(words_NKC[:, 0::2], words_NKC[:, 1::2])
        gathered_RKC = gather_partials(torch.stack((own.max_T, own.sum_T), 1).flatten(0, 1), self.group)
        whole = MergedSoftmax.of(gathered_RKC[:, 0::2], gathered_RKC[:, 1::2])
        return whole.max_T, whole.sum_T
