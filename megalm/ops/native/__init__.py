"""The operations of csrc/ in torch: their shapes for tracing, their gradients, and functions that call them.

Each module has ``register(namespace)``, called when the library that defines the operations is loaded, and functions
with the signatures of the references in megalm.ops, made for a namespace: ``megalm`` on CPU and CUDA tensors, and
``megalm_emu``, CUDA's kernels run on the host, which tests load.
"""
