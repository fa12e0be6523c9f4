"""One module an op: its schema, its argument checks, its fake, its autograd Function and its public function."""
