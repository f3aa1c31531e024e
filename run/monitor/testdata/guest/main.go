// Command guest is what runs in the containers of the tests: a program without
// libraries, named for what it does.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	args := os.Args[1:]
	switch name := filepath.Base(os.Args[0]); name {
	case "echo":
		fmt.Println(strings.Join(args, " "))
	case "warn":
		fmt.Fprintln(os.Stderr, strings.Join(args, " "))
	case "exit":
		os.Exit(number(args))
	case "cat":
		if _, err := io.Copy(os.Stdout, os.Stdin); err != nil {
			os.Exit(1)
		}
	case "sleep":
		fmt.Println("asleep")
		time.Sleep(time.Duration(number(args)) * time.Second)
	case "lines": // so many of 100 bytes
		w := bufio.NewWriter(os.Stdout)
		for i := range number(args) {
			fmt.Fprintf(w, "%099d\n", i)
		}
		w.Flush()
	case "ticks": // a line whenever a line comes
		for i, s := 0, bufio.NewScanner(os.Stdin); s.Scan(); i++ {
			fmt.Println("tick", i)
		}
	case "trap": // says which signal came, and ends
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1)
		fmt.Println("ready")
		fmt.Println("got", <-c)
		os.Exit(3)
	case "deaf": // to all but SIGKILL
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "leave": // one behind who writes for as long as anybody reads
		if len(args) == 0 {
			r, w, err := os.Pipe()
			if err != nil {
				panic(err)
			}
			cmd := exec.Command("/bin/leave", "behind")
			cmd.Stdout, cmd.ExtraFiles = os.Stdout, []*os.File{w}
			if err := cmd.Start(); err != nil {
				panic(err)
			}
			w.Close()
			io.Copy(io.Discard, r) // until it has written
			os.Exit(3)
		}
		written := os.NewFile(3, "written")
		for _, err := fmt.Println("still here"); err == nil; _, err = fmt.Println("still here") {
			written.Close()
			time.Sleep(100 * time.Millisecond)
		}
	case "tty": // its size, now and whenever a line comes
		for s := bufio.NewScanner(os.Stdin); ; {
			var size [4]uint16
			_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
			fmt.Println("size", size[0], size[1], errno == 0)
			if !s.Scan() {
				return
			}
		}
	case "eat": // memory, in MiB
		var kept [][]byte
		for range number(args) {
			b := make([]byte, 1<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			kept = append(kept, b)
		}
		fmt.Println("ate", len(kept))
	default:
		fmt.Fprintln(os.Stderr, "guest: what is", name)
		os.Exit(99)
	}
}

func number(args []string) int {
	if len(args) == 0 {
		return 0
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		panic(err)
	}
	return n
}
