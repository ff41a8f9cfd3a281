"""Problems up to a million nonzeros: `python -m benchmarks --suite scale`. `cases` declares them;
`building` measures what a layer costs, each in a process of its own."""
