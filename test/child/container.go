package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// wait says that the file is there and ends when it is told to.
func wait(path string) error {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGTERM, syscall.SIGINT)
	if _, err := os.Lstat(path); err != nil {
		return err
	}
	fmt.Println("up")
	<-told
	return nil
}

// change makes one change of every kind below a directory that holds files 0 to 5,
// and dir with two files in it.
func change(dir string) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, step := range []func() error{
		func() error { return os.WriteFile(at("new"), []byte("new"), 0o640) },
		func() error { return os.WriteFile(at("0"), []byte("replaced"), 0o644) },
		func() error { return os.Remove(at("1")) },
		func() error { return os.Rename(at("2"), at("renamed")) },
		func() error { return os.Link(at("3"), at("linked")) },
		func() error { return os.Chmod(at("4"), 0o600) },
		func() error { return os.Lchown(at("5"), 1, 2) },
		func() error { return os.Symlink("new", at("symlink")) },
		func() error { return os.RemoveAll(at("dir")) },
		func() error { return os.Mkdir(at("dir"), 0o700) },
		func() error { return os.WriteFile(at("dir/again"), []byte("again"), 0o644) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
