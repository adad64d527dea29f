"""Certificates: proof, number by number, that an imported model computes what its source computes.

The one package that imports torch, timm, torchvision and transformers (extra `parity`).
docs/certificates.md says what a certificate proves and how to read one.
"""
