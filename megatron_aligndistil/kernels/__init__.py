"""Statistics of softmaxes over a sharded vocabulary; nothing that is V wide leaves this package.

One folder an op: ``dispatch`` is the public function and chooses the implementation, ``chunked`` is PyTorch on any
device, ``reference`` is dense float64 from the formulas. What the ops share:

``head_product``      logits of a chunk in the accumulator's precision, and the two products of the gradient
``partials``          softmax sums of one shard, gathered and merged over the shards
``vocabulary_sweep``  the driver: chunks of tokens, one collective, its own backward pass

Sharding contract, for every op. The hidden states [T, H] are whole on each tensor-parallel rank, and the results [T]
are equal on each. A kernel's gradient of the hidden states is the *partial* one of its vocabulary shard: the caller
takes the hidden states out of Megatron's ``copy_to_tensor_model_parallel_region`` (or, under sequence parallelism,
``gather_from_sequence_parallel_region(..., tensor_parallel_output_grad=True)``), whose backward pass sums the partials.
T is equal over a tensor-parallel group; T = 0 gives zero gradients, not None.
"""
