module sidegate.dev/bench

go 1.26
