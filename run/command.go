package run

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// ErrNoCommand is given where neither the user nor the image says what to run.
var ErrNoCommand = errors.New("no command specified")

// Command is what runs: the entrypoint's words, then the command's. An
// entrypoint of the user's takes the image's command away, docker's rule. The
// error is [ErrNoCommand].
func Command(o Options, image ocispec.ImageConfig) ([]string, error) {
	entry, cmd := image.Entrypoint, o.Cmd
	if o.Entrypoint != nil {
		entry = *o.Entrypoint
	} else if len(cmd) == 0 {
		cmd = image.Cmd
	}
	// docker's --entrypoint "" is one empty word and means none.
	if len(entry) == 1 && entry[0] == "" {
		entry = nil
	}
	all := slices.Concat(entry, cmd)
	if len(all) == 0 || all[0] == "" && len(all) == 1 {
		return nil, ErrNoCommand
	}
	return all, nil
}

// StopSignal is what asks a container to end: the user's, the image's, SIGTERM.
// The image's is foreign: one that does not exist is as if it had none.
func StopSignal(o Options, image ocispec.ImageConfig) (syscall.Signal, error) {
	if o.StopSignal != "" {
		return ParseSignal(o.StopSignal)
	}
	if sig, err := ParseSignal(image.StopSignal); err == nil {
		return sig, nil
	}
	return unix.SIGTERM, nil
}

// The kernel's real-time signals begin at 32; libc keeps two of them (signal(7)).
const (
	sigRTMin = 34
	sigRTMax = 64
)

// ParseSignal reads a signal as users give it: 9, KILL, SIGKILL, rtmin+3.
func ParseSignal(s string) (syscall.Signal, error) {
	bad := fmt.Errorf("invalid signal: %s", s)
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > sigRTMax {
			return 0, bad
		}
		return syscall.Signal(n), nil
	}
	name := "SIG" + strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	base := sigRTMin
	rest, ok := strings.CutPrefix(name, "SIGRTMIN")
	if !ok {
		base = sigRTMax
		if rest, ok = strings.CutPrefix(name, "SIGRTMAX"); !ok {
			return 0, bad
		}
	}
	if rest == "" {
		return syscall.Signal(base), nil
	}
	n, err := strconv.Atoi(rest)
	if err != nil || base == sigRTMin && rest[0] != '+' || base == sigRTMax && rest[0] != '-' || base+n < sigRTMin || base+n > sigRTMax {
		return 0, bad
	}
	return syscall.Signal(base + n), nil
}
