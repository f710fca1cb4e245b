"""Proof on the user's own machine and layout: values and gradients against dense float64, words on the wire, bytes.

``formulas``    per-token statistics from whole logits, straight from the definitions
``dense_model`` a model and its losses in float64 on one process, by plain autograd; more losses in ``dense_*``
``kernels``     the registry of kernel checks, ``algorithms`` that of the algorithms (``preferences`` has part of them)
``sharded``     an optimizer step's loss and gradient on Megatron-Core, in any layout
``recorder``    what a call sent and held: counted at the operators, not assumed
``suite``       all checks of a layout; ``findings`` is what comes out

``formulas`` and ``dense_model`` with its losses share no code with the rest of the package.
"""
