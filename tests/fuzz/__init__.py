"""Random calls of the library, each reproducible from its seed: `make fuzz`, or `python -m fuzz --help` in tests/.

cases.py         what a case is: everything that is drawn, its tensors, and its text as runnable code
differential.py  runs a case and compares it with float64 autograd of the plain composition
arguments.py     calls the ops of torch.ops.manualbp directly, with arguments that do not fit
runner.py        goes through seeds for a time, in a process that may crash, and makes a failing case small
"""
