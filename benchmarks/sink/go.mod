module sink

go 1.24
