package monitor

import (
	"errors"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// children are the processes whose parent this one is or becomes: the runtime,
// while it is called; the container's init and its execs, which the runtime leaves
// behind, and which are waited for by name; and whatever else the runtime leaves
// behind. These must be waited for too, or a pid namespace that they are in does
// not end.
type children struct {
	calls sync.RWMutex  // held for reading while the runtime is called
	again chan struct{} // of capacity 1: something may be there to be collected

	mu    sync.Mutex               // guards what follows
	named map[int]*unix.WaitStatus // with the status, if it was collected
}

func newChildren() *children {
	return &children{again: make(chan struct{}, 1), named: map[int]*unix.WaitStatus{}}
}

// during calls the runtime. What it leaves behind is not collected before call has
// given those names that need them.
func (k *children) during(call func() error) error {
	k.calls.RLock()
	defer k.kick()
	defer k.calls.RUnlock()
	return call()
}

func (k *children) kick() {
	select {
	case k.again <- struct{}{}:
	default:
	}
}

// name says that a process is one that wait will be called for.
func (k *children) name(pid int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.named[pid] = nil
}

// wait waits for the end of a process that has a name.
func (k *children) wait(pid int) unix.WaitStatus {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		if collected := k.named[pid]; err != nil && collected != nil {
			ws = *collected
		} else if err != nil {
			ws = 255 << 8 // it was nobody's child
		}
		delete(k.named, pid)
		return ws
	}
}

// collect waits for all that has no name, for as long as this process lives.
func (k *children) collect() {
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	for {
		select {
		case <-died:
		case <-k.again:
		}
		// If it is being called just now, it will be tried again after that.
		if !k.calls.TryLock() {
			continue
		}
		for k.collectOne() {
		}
		k.calls.Unlock()
	}
}

func (k *children) collectOne() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	var ws unix.WaitStatus
	pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
	if errors.Is(err, unix.EINTR) {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	if _, named := k.named[pid]; named {
		k.named[pid] = &ws
	}
	return true
}
