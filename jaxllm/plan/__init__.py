"""plan: every layout of a mesh scored by the closed forms of memory and time, and the best of them."""
