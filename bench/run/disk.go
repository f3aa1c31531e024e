package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// diskSize is more than the uppers of one turn.
const diskSize = 8 << 30

// disk is a new ext4 in a file of the scratch directory. On one that is in use,
// what was deleted before slows down what is made next: for a minute and more
// ext4 gives no inode that was freed (recently_deleted in fs/ext4/ialloc.c), but
// looks at each.
type disk struct{ b *bench }

func (d *disk) dir() string  { return filepath.Join(d.b.dir, "disk") }
func (d *disk) file() string { return d.dir() + ".img" }

// open makes and mounts it.
func (d *disk) open(ctx context.Context) (dir string, err error) {
	if err := errors.Join(d.b.remove(d.file()), os.MkdirAll(d.dir(), 0o755)); err != nil {
		return "", err
	}
	f, err := os.Create(d.file())
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return "", err
	}
	if err := d.b.command(ctx, "mkfs.ext4", "-q", "-F", d.file()); err != nil {
		return "", err
	}
	// Nothing is to be written to it behind anybody's back.
	return d.dir(), d.b.command(ctx, "mount", "-t", "ext4", "-o", "loop,noinit_itable", d.file(), d.dir())
}

func (d *disk) close() error {
	if err := unix.Unmount(d.dir(), 0); err != nil {
		return fmt.Errorf("unmount %s: %w", d.dir(), err)
	}
	return errors.Join(os.Remove(d.dir()), os.Remove(d.file()))
}
