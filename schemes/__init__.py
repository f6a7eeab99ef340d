"""What a quantized tensor is: number formats, specs, ops and the quantized Linears. Nothing here knows a compiler."""

if __name__ != "quark_inductor.schemes":
    raise ImportError("import quark_inductor.schemes, not schemes: two copies would register every op twice")
