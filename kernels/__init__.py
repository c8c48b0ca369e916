"""Which operations are worth a kernel of their own? Triton code, each beside its plain reference."""

if __name__ != "iwm_fast.kernels":
    # under a second name every operation would be registered twice
    raise ImportError("the folder kernels/ is imported as iwm_fast.kernels, got " + __name__)
