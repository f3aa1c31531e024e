// Package monitor is the process that stands beside one container: it makes the
// bundle, drives the OCI runtime, keeps the container's stdio and its log, waits
// for its init, and says how it ended. It outlives the daemon that started it.
// The client of its socket is here too, and what reads the container's directory
// without it.
//
// A container's directory (DIR) holds
//
//	monitor.json  the Config, written by who made the container
//	lock          locked by the monitor for as long as the container is its own
//	state.json    what the monitor knows: pid, when it was started, paused
//	exit.json     how the container ended; absent while it goes on
//	log.json      what it wrote, as docker's json-file driver has it, and log.json.1 before it
//	bundle/       the OCI bundle
//	monitor.log, runtime.log   what the monitor and the runtime had to complain of
//
// A container whose monitor is killed may go on, as under containerd's shim: what
// it writes then goes nowhere, nobody hears its end, and State calls it dead. Reap
// kills it and takes away what is left.
package monitor

import (
	"errors"
	"io"
	"io/fs"
	"time"

	"github.com/varvefs/varve/run"
)

// Config is what a monitor must know of its container.
type Config struct {
	// Container is what the bundle is made of. Its Dir is the container's directory,
	// its ID names it to the runtime (letters, digits, _ and -). The monitor reads its
	// Root, the daemon must not. Options.Runtime is the runtime, as FindRuntime has it.
	Container run.Container
	// RuntimeRoot is where the runtime keeps its state, shared by all containers.
	// It should not survive a reboot.
	RuntimeRoot string
	// Socket is the unix socket that the monitor answers on. Its path has at most 100
	// bytes. Its directory exists.
	Socket string
	// SocketMode are its permissions, 0600 if zero.
	SocketMode fs.FileMode `json:",omitempty"`
	// StdinOnce closes an interactive container's stdin when the first client that
	// gave it input is gone, as docker does for `run -i`. Without it stdin stays
	// open for later clients.
	StdinOnce bool `json:",omitempty"`
	// LogMax is how large log.json may become, in bytes, before it becomes
	// log.json.1, of which there is one: 64 MiB if zero.
	LogMax int64 `json:",omitempty"`
	// Stall is how long a client may take nothing of what it is sent before it is
	// dropped. Until then it holds the container up: 1 minute if zero.
	Stall time.Duration `json:",omitempty"`
}

// The states of a container.
const (
	Created = "created" // nothing ran yet, or it could not be started: see Exit
	Running = "running"
	Paused  = "paused"
	Exited  = "exited"
	Dead    = "dead" // the monitor was killed; its container may still be there until Reap
)

// Status is what is known of a container.
type Status struct {
	State string
	// Pid is the init's, as this pid namespace has it; 0 if it does not run.
	Pid int `json:",omitempty"`
	// Monitor is the pid of the monitor, 0 if there is none.
	Monitor int `json:",omitempty"`
	// Started is when the runtime was last told to start it, zero if never.
	Started time.Time `json:",omitzero"`
	// Exit is how it ended; nil while it goes on, when it is dead, and before its
	// first start. With State Created it is why it could not be started.
	Exit *Exit `json:",omitempty"`
	// Warnings are what could not be done as asked, from the last start.
	Warnings []string `json:",omitempty"`
	// LogLost counts the bytes that could not be written to the log.
	LogLost int64 `json:",omitempty"`
}

// Exit is how a process ended.
type Exit struct {
	// Code is its exit code, or 128 and the signal's number. 125, 126 and 127 with an
	// Error are why it did not start: the runtime or varve failed, the command
	// cannot be executed, the command does not exist.
	Code      int
	Finished  time.Time
	OOMKilled bool   `json:",omitempty"`
	Error     string `json:",omitempty"`
}

// StartError is why a process was not started. Its text is for users.
type StartError struct {
	Code    int // 125, 126 or 127, as Exit has it; 128 and more: a signal came first
	Message string
}

func (e *StartError) Error() string { return e.Message }

var (
	// ErrGone is returned where no monitor answers: the container ended, was never
	// launched, or is dead. State tells which.
	ErrGone = errors.New("the container does not run")
	// ErrDetached is returned when the user typed the keys that detach. The
	// container goes on.
	ErrDetached = errors.New("detached")
	// ErrSlow is returned when the monitor gave a client up that took nothing of the
	// output for too long. The container goes on, and its log has the output.
	ErrSlow = errors.New("the output was not taken for too long; the container goes on, its log has the rest")
)

// Streams are a client's ends of a process' stdio. Each may be nil: then nothing
// is sent, or what comes is thrown away. If In or Out is a terminal's *os.File
// and the process has one too, it is made raw meanwhile, and its size followed.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// AttachOptions are how a client attaches to a container.
type AttachOptions struct {
	// Start starts the container when the client hears it, so that no output is lost.
	Start bool
	// TTY says that the container has a terminal.
	TTY bool
	// DetachKeys end the attachment when typed, as docker writes them: "ctrl-p,ctrl-q"
	// if empty, "none" for none. Only where In is a terminal.
	DetachKeys string
	// SigProxy passes the signals that a user sends this process (HUP, INT, QUIT,
	// TERM, USR1, USR2, ALRM, CONT) on to the container instead of ending the client.
	SigProxy bool
	// Started is called when the container runs, with the time at which the runtime
	// had started it. It may be nil.
	Started func(time.Time)
}

// ExecOptions are how a client runs a further process in a container.
type ExecOptions struct {
	// Process is what runs. With Detach it is left alone once it runs: Exec returns
	// code 0 then, and what it writes is thrown away. Without Interactive it has no
	// stdin, whatever the Streams.
	Process run.ExecOptions
	// DetachKeys and SigProxy are as in AttachOptions.
	DetachKeys string
	SigProxy   bool
}

// LogOptions are what is wanted of a log.
type LogOptions struct {
	// Follow goes on until the container's end.
	Follow bool
	// Tail is how many of the last lines are wanted; all if negative.
	Tail int
	// Since and Until bound the lines' times; zero does not.
	Since, Until time.Time
	// Timestamps puts the time before each line, as RFC 3339 with nine digits.
	Timestamps bool
	// Stdout and Stderr get what the container wrote to each; nil throws it away.
	Stdout, Stderr io.Writer
}
