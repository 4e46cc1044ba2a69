"""What runs the ops: `cuda` and `cpu` (C++, csrc/), `triton`, and `reference` (plain torch).

Each is a module with
    OPS           the functions that run an op, by its name. All backends' take the same arguments, the results last:
                  `extension.py` has their signatures
    DTYPES        the dtypes of images that they take
    unavailable   why the backend cannot be used here at all, or the empty string
    refusal       a function: why it cannot run on tensors of a device, or the empty string
dispatch.py chooses one for a call.
"""
