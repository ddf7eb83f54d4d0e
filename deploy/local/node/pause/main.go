// The program in the only image that a local node has of its own: what holds a pod's namespaces together (started
// without arguments, it waits until it is told to end), and what tests run in pods: steps, one after another, as in
// `pause print hello write /dev/termination-log bye exit 3`. It needs no files, no shell and no rights.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// How many words each step takes.
var words = map[string]int{
	"print": 1, // a line to standard output
	"write": 2, // a file and its text
	"read":  1, // a file, to standard output
	"get":   1, // a URL, its body to standard output
	"serve": 2, // an address and the text that every request is answered with, in the background
	"sleep": 1, // seconds
	"eat":   1, // so many MiB of memory, for good
	"wait":  0, // until SIGTERM or SIGINT
	"exit":  1, // a status
}

func main() {
	steps := os.Args[1:]
	if len(steps) == 0 {
		wait()
		return
	}
	for len(steps) > 0 {
		count, known := words[steps[0]]
		if !known || len(steps) <= count {
			fail(fmt.Errorf("no such step, or too few words for it: %q", steps))
		}
		if err := run(steps[0], steps[1:1+count]); err != nil {
			fail(err)
		}
		steps = steps[1+count:]
	}
}

func run(step string, given []string) error {
	switch step {
	case "print":
		fmt.Println(given[0])
	case "write":
		return os.WriteFile(given[0], []byte(given[1]), 0o644)
	case "read":
		text, err := os.ReadFile(given[0])
		os.Stdout.Write(text)
		return err
	case "get":
		return get(given[0])
	case "serve":
		go func() { fail(http.ListenAndServe(given[0], answer(given[1]))) }()
	case "sleep":
		seconds, err := strconv.ParseFloat(given[0], 64)
		time.Sleep(time.Duration(seconds * float64(time.Second)))
		return err
	case "eat":
		size, err := strconv.Atoi(given[0])
		eat(size << 20)
		return err
	case "wait":
		wait()
	case "exit":
		status, err := strconv.Atoi(given[0])
		if err != nil {
			return err
		}
		os.Exit(status)
	}
	return nil
}

var eaten [][]byte

func eat(size int) {
	memory := make([]byte, size)
	for i := range memory {
		memory[i] = 1
	}
	eaten = append(eaten, memory)
}

func get(url string) error {
	client := http.Client{Timeout: 10 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(os.Stdout, response.Body)
	return err
}

func answer(text string) http.HandlerFunc {
	return func(writer http.ResponseWriter, _ *http.Request) { io.WriteString(writer, text) }
}

// As the first process of a pod it also buries the dead, in pods that share one PID namespace.
func wait() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "pause:", err)
	os.Exit(1)
}
