"""Makes random calls of the library, reproducible from a seed: `make fuzz`, or `python -m fuzz --help` in tests/.

cases.py         defines a case: its drawn options, its tensors, and its text as runnable code
differential.py  runs a case and compares it with float64 autograd on the plain composition
arguments.py     calls the ops of torch.ops.manualbp directly, with invalid arguments
runner.py        runs seeds for a limited time, in a process that may crash, and shrinks a failing case
"""
