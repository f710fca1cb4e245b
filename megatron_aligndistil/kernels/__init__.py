"""Statistics of softmaxes over a sharded vocabulary; nothing that is V wide leaves this package.

One folder an op: ``dispatch`` has the public functions, ``chunked`` its words, merger and gradient over tiles,
``reference`` the dense float64 form. What the ops share:

``settings``          plans, and how a call is cut into tiles
``backends``          where products and sweeps run: PyTorch, compiled CPU loops, Triton
``partials``          softmax sums of a part of the vocabulary, gathered and merged
``statistic``         what an op says about itself, and the tiles it is run over
``vocabulary_sweep``  the driver: a sweep, one collective, its own backward pass
``gradients``         from the logits' gradient to dH and dW
``triton_sweeps``     the Triton kernels

Sharding contract, for every op. The hidden states [T, H] are whole on each tensor-parallel rank, and the results [T]
are equal on each. A kernel's gradient of the hidden states is the *partial* one of its vocabulary shard: the caller
takes the hidden states out of Megatron's ``copy_to_tensor_model_parallel_region`` (or, under sequence parallelism,
``gather_from_sequence_parallel_region(..., tensor_parallel_output_grad=True)``), whose backward pass sums the partials.
T is equal over a tensor-parallel group; T = 0 gives zero gradients, not None.
"""
