"""One engine per kind of store; each room brings its own tables and scripts."""
