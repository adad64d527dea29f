"""`python -m vision_jax` is the console script `vision_jax`."""

from vision_jax.main import command

if __name__ == "__main__":
    command()
