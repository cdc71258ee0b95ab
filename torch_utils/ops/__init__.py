"""Differentiable tensor operations: each a public function beside its `_ref`."""
