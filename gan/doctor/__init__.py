"""What works on this machine, what does not and why, and what to type about it: plain facts for `gan doctor`."""
