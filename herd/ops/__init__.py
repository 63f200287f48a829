"""How a machine does a few steps of the model. Each file has the plain torch form, which is the definition, and the fast one beside it."""
