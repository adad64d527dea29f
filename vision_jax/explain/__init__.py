"""Why a model says what it says: maps of what it looks at, and measures of how far to trust them.

    Forward --target--> score --method--> map --measures--> how faithful it is

A method is a pure function (forward, variables, images, target, keys, **options) -> f[B, ...], for
jit, grad and vmap, of base, adapted, quantized and attacked models alike. methods.METHODS lists
them.
"""
