"""The systems that DisCL is compared with, each by its formulas alone; `stages/` feeds them."""
