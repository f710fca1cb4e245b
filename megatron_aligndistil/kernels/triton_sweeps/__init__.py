"""The elementwise sweeps over a chunk's fp32 logits, in Triton: each reads every logit once and writes nothing V wide
but a gradient.

``softmax``        softmax sums, the entropy, a label's log-probability
``token_kl``       the KL between two models, either way
``extrapolation``  the teachers' scalars and the KL to the extrapolated teacher
``launching``      what the launchers share: checks, tuning, the grids
``online``         what the kernels share
``compiled``       registers, shared memory and spills of the compiled kernels, read without a GPU

A statistic's program owns a row and walks it in blocks. Sums are kept per lane and rescaled when the row's maximum
grows, so each block costs one reduction and one exponential an element. Importing this package doesn't import Triton;
importing ``compiled`` or a launcher's module does.
"""
