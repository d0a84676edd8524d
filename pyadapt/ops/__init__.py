"""The ops: one file a kernel family, with its autograd Function, schema, fake and plain-torch reference."""
