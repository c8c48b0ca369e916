"""Which operations are worth a kernel of their own? Triton code, with a plain reference beside each operation."""

if __name__ != "iwm_fast.kernels":
    # Importing the folder under a second name would register every operation with torch.library twice.
    raise ImportError("the folder kernels/ is imported as iwm_fast.kernels, got " + __name__)
