// Command child is what the tests run beside the daemon, and from mounts.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: child sum|mmap|hold|storm|wait|change PATH")
		os.Exit(2)
	}
	if err := map[string]func(string) error{"sum": sum, "mmap": mmap, "hold": hold, "storm": storm, "wait": wait, "change": change}[os.Args[1]](os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// sum prints the digest of a file.
func sum(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	fmt.Printf("%x\n", h.Sum(nil))
	return nil
}

// mmap prints the digest of a file that it reads through a mapping, from its
// last page to its first.
func mmap(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	b, err := syscall.Mmap(int(f.Fd()), 0, int(st.Size()), syscall.PROT_READ, syscall.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer syscall.Munmap(b)
	var touched byte
	for i := len(b) - 1; i >= 0; i -= 4096 {
		touched ^= b[i]
	}
	runtime.KeepAlive(touched)
	fmt.Printf("%x\n", sha256.Sum256(b))
	return nil
}

// hold keeps a file open without having read it, says so, and reads it when its
// standard input ends.
func hold(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fmt.Println("open")
	io.Copy(io.Discard, os.Stdin)
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	fmt.Printf("%x\n", h.Sum(nil))
	return nil
}

// storm reads every file of a tree from many goroutines while the collector and
// a sender of signals interrupt them, and prints a digest of all.
func storm(root string) error {
	var files []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, p)
		}
		return err
	})
	if err != nil {
		return err
	}
	done := make(chan struct{})
	var noise sync.WaitGroup
	noise.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				runtime.GC()
				syscall.Kill(os.Getpid(), syscall.SIGURG)
			}
		}
	})
	sums := make([][sha256.Size]byte, len(files))
	errs := make([]error, len(files))
	var readers sync.WaitGroup
	for i, p := range files {
		readers.Go(func() {
			var b []byte
			if b, errs[i] = os.ReadFile(p); errs[i] == nil {
				sums[i] = sha256.Sum256(b)
			}
		})
	}
	readers.Wait()
	close(done)
	noise.Wait()
	h := sha256.New()
	for i := range files {
		if errs[i] != nil {
			return errs[i]
		}
		h.Write(sums[i][:])
	}
	fmt.Printf("%x %d\n", h.Sum(nil), len(files))
	return nil
}
