"""The processes of one run and who watches over them; nothing here imports JAX."""
