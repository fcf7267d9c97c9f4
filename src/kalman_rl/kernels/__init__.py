"""Compiled ways of computing what the rest of the package defines in plain torch.

Nothing here is needed: where numba or Triton is missing, the torch definition runs instead. Modules of this
package import compilers inside functions only, so that importing them costs nothing.
"""
