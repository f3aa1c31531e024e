package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// readVerb has this program read files, as a process of its own, and say what
// that took.
const readVerb = "read"

// The ways to read.
const (
	readEach       = "each"       // PATHS: open, read to the end and close each file that a list names
	readSequential = "sequential" // one file from its start to its end
	readRandom     = "random"     // SEED COUNT: blocks of one file, none twice
	readAdvised    = "advised"    // the same after posix_fadvise(POSIX_FADV_RANDOM), as fio does by default
)

const (
	sequentialBuffer = 128 << 10 // what cat and tar read at once
	randomBlock      = 4 << 10
)

// readOf is what one process found.
type readOf struct {
	Wall, CPU time.Duration // CPU of the thread that reads; what the daemon computes is not in it
	Reads     int           // files, or blocks
	Bytes     int64
}

// readBy runs this program once more, in dir.
func readBy(ctx context.Context, dir string, args ...string) (r readOf, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{readVerb}, args...)...)
	cmd.Dir = dir
	var said strings.Builder
	cmd.Stderr = &said
	text, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("read %s in %s: %w: %.300s", strings.Join(args, " "), dir, err, said.String())
	}
	return r, json.Unmarshal(text, &r)
}

// readOnce is what such a process does. A file is named from its directory, so
// that all file systems have paths of the same length.
func readOnce(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("%s WAY FILE...", readVerb)
	}
	work, err := prepareRead(args[0], args[1], args[2:])
	if err != nil {
		return err
	}
	runtime.GC()
	runtime.LockOSThread()
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		return err
	}
	var r readOf
	start := time.Now()
	if err := work(&r); err != nil {
		return err
	}
	r.Wall = time.Since(start)
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		return err
	}
	cpu := func(u unix.Rusage) time.Duration { return time.Duration(u.Utime.Nano() + u.Stime.Nano()) }
	r.CPU = cpu(after) - cpu(before)
	return json.NewEncoder(os.Stdout).Encode(r)
}

// prepareRead does what is not to be measured.
func prepareRead(way, file string, more []string) (func(*readOf) error, error) {
	switch {
	case way == readEach && len(more) == 0:
		list, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		names := strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00")
		return func(r *readOf) error { return readNames(names, r) }, nil
	case way == readSequential && len(more) == 0:
		return func(r *readOf) error { return readNames([]string{file}, r) }, nil
	case (way == readRandom || way == readAdvised) && len(more) == 2:
		seed, err := strconv.ParseUint(more[0], 10, 64)
		if err != nil {
			return nil, err
		}
		count, err := strconv.Atoi(more[1])
		if err != nil {
			return nil, err
		}
		info, err := os.Stat(file)
		if err != nil {
			return nil, err
		}
		blocks, err := randomBlocks(seed, count, info.Size()/randomBlock)
		if err != nil {
			return nil, err
		}
		return func(r *readOf) error { return readBlocks(file, blocks, way == readAdvised, r) }, nil
	}
	return nil, fmt.Errorf("no way %q to read with %q", way, more)
}

// randomBlocks draws count of all blocks, none twice.
func randomBlocks(seed uint64, count int, all int64) ([]int64, error) {
	if int64(count) > all/2 {
		return nil, fmt.Errorf("%d reads of a file of %d blocks are not random", count, all)
	}
	r := rand.New(rand.NewPCG(seed, 0))
	drawn, blocks := map[int64]bool{}, make([]int64, 0, count)
	for len(blocks) < count {
		if b := r.Int64N(all); !drawn[b] {
			drawn[b] = true
			blocks = append(blocks, b)
		}
	}
	return blocks, nil
}

// readNames opens, reads and closes each file. The calls are the bare ones: what
// the runtime does around a file would be the same on all and hide differences.
func readNames(names []string, r *readOf) error {
	buf := make([]byte, sequentialBuffer)
	for _, name := range names {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: name, Err: err}
		}
		for {
			n, err := unix.Read(fd, buf)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				unix.Close(fd)
				return &os.PathError{Op: "read", Path: name, Err: err}
			}
			if n == 0 {
				break
			}
			r.Bytes += int64(n)
		}
		if err := unix.Close(fd); err != nil {
			return &os.PathError{Op: "close", Path: name, Err: err}
		}
		r.Reads++
	}
	return nil
}

func readBlocks(name string, blocks []int64, advised bool, r *readOf) error {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	if advised {
		if err := unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM); err != nil {
			return &os.PathError{Op: "fadvise", Path: name, Err: err}
		}
	}
	buf := make([]byte, randomBlock)
	for _, b := range blocks {
		n, err := unix.Pread(fd, buf, b*randomBlock)
		for err == unix.EINTR {
			n, err = unix.Pread(fd, buf, b*randomBlock)
		}
		if err == nil && n != len(buf) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return &os.PathError{Op: "read", Path: name, Err: err}
		}
		r.Reads++
		r.Bytes += int64(n)
	}
	return nil
}

// smallFiles lists every so many of the files below dir that are no larger than
// most bytes, so that there are count of them, as the verb reads them.
func smallFiles(dir string, count int, most int64) (list []byte, files int, err error) {
	var names []string
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() <= most {
			names = append(names, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	count = min(count, len(names))
	for i := range count {
		list = append(append(list, names[i*len(names)/count]...), 0)
	}
	return list, count, nil
}
