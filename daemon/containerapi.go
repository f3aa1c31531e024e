package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"syscall"
	"time"

	"github.com/varvefs/varve/run"
)

// RunOptions are what `varve run` asks for: a writable mount, and a process in it.
type RunOptions struct {
	MountOptions
	Run       run.Options `json:"run"`                  // resolved, see [run.Options.Resolve]
	Remove    bool        `json:"remove,omitempty"`     // mount, changes and volumes, when the process has ended
	StdinOnce bool        `json:"stdin_once,omitempty"` // its stdin ends with that of the first client
}

// StartOptions are what `varve start` asks for.
type StartOptions struct {
	Mount      string `json:"mount"`
	Auth       Auth   `json:"auth"`
	AuthConfig string `json:"auth_config,omitempty"`
}

// StopOptions are what `varve stop` and `varve kill` ask for.
type StopOptions struct {
	Mount  string `json:"mount"`
	Signal string `json:"signal,omitempty"` // "" for the container's own; of a kill SIGKILL
	// Timeout is how long the signal may take before SIGKILL follows, in seconds.
	// nil is the container's own, less than 0 for ever. Of no use to a kill.
	Timeout *int `json:"timeout,omitempty"`
}

// ContainerLogOptions are what `varve logs` asks for.
type ContainerLogOptions struct {
	Mount      string    `json:"mount"`
	Follow     bool      `json:"follow,omitempty"` // until the container's end
	Tail       int       `json:"tail"`             // last lines, all if negative
	Since      time.Time `json:"since,omitzero"`
	Until      time.Time `json:"until,omitzero"`
	Timestamps bool      `json:"timestamps,omitempty"`
}

// Container is what is known of the process of a mount.
type Container struct {
	State         ContainerState `json:"State"`
	Args          []string       `json:"Args"`
	Options       run.Options    `json:"Options"`
	StopSignal    syscall.Signal `json:"StopSignal"`
	Remove        bool           `json:"AutoRemove"`
	Dir           string         `json:"Dir"`     // bundle, log, volumes
	LogPath       string         `json:"LogPath"` // as docker's json-file driver writes it
	Socket        string         `json:"Socket"`  // its monitor's
	Waiting       bool           `json:"Waiting"` // its monitor waits for who starts it
	Served        bool           `json:"Served"`  // it reads its image through the daemon
	FetchedBefore int64          `json:"FetchedBefore"`
}

// ContainerState is docker's State of an inspection.
type ContainerState struct {
	Status     string    `json:"Status"` // created, running, paused, exited, dead
	Running    bool      `json:"Running"`
	Paused     bool      `json:"Paused"`
	OOMKilled  bool      `json:"OOMKilled"`
	Dead       bool      `json:"Dead"`
	Pid        int       `json:"Pid"` // 0 if it does not run
	ExitCode   int       `json:"ExitCode"`
	Error      string    `json:"Error"`
	StartedAt  time.Time `json:"StartedAt"`
	FinishedAt time.Time `json:"FinishedAt"`
}

// Run mounts an image and has a monitor stand by: see [Container.Socket].
func (c *Client) Run(ctx context.Context, o RunOptions) (*Mount, error) {
	e, err := c.follow(ctx, "/v1/containers", o)
	return e.Mount, err
}

// StartContainer mounts a container again that ended and has a monitor stand by.
func (c *Client) StartContainer(ctx context.Context, o StartOptions) (*Mount, error) {
	e, err := c.follow(ctx, "/v1/containers/start", o)
	return e.Mount, err
}

// StopContainer stops a container, if it runs, and gives its name.
func (c *Client) StopContainer(ctx context.Context, o StopOptions) (name string, err error) {
	return name, c.get(ctx, http.MethodPost, "/v1/containers/stop", o, &name)
}

// KillContainer sends a signal to a container that runs and gives its name.
func (c *Client) KillContainer(ctx context.Context, o StopOptions) (name string, err error) {
	return name, c.get(ctx, http.MethodPost, "/v1/containers/kill", o, &name)
}

// WaitContainer waits until a container has ended and is unmounted, or removed.
func (c *Client) WaitContainer(ctx context.Context, name string) (e Ended, err error) {
	return e, c.get(ctx, http.MethodPost, "/v1/containers/wait", UnmountOptions{Mount: name}, &e)
}

// output is a part of what a container wrote, as it crosses the socket.
type output struct {
	Stderr bool   `json:"e,omitempty"`
	Data   []byte `json:"d"`
}

// ContainerLogs writes what a container wrote.
func (c *Client) ContainerLogs(ctx context.Context, o ContainerLogOptions, stdout, stderr io.Writer) error {
	r, w := io.Pipe()
	copied := make(chan error, 1)
	go func() {
		err := c.copy(ctx, "/v1/containers/logs", o, w)
		w.CloseWithError(err)
		copied <- err
	}()
	defer r.Close()
	for dec := json.NewDecoder(r); ; {
		var part output
		if err := dec.Decode(&part); err == io.EOF {
			return <-copied
		} else if err != nil {
			return err
		}
		to := stdout
		if part.Stderr {
			to = stderr
		}
		if _, err := to.Write(part.Data); err != nil {
			return fmt.Errorf("write the log: %w", err)
		}
	}
}

// handleContainers registers the calls of containers.
func (d *Daemon) handleContainers(mux *http.ServeMux) {
	follow(mux, "POST /v1/containers", func(ctx context.Context, o RunOptions, n note) (event, error) {
		m, err := d.Run(ctx, o, n)
		return event{Mount: m}, err
	})
	follow(mux, "POST /v1/containers/start", func(ctx context.Context, o StartOptions, n note) (event, error) {
		m, err := d.StartContainer(ctx, o, n)
		return event{Mount: m}, err
	})
	handle(mux, "POST /v1/containers/stop", func(ctx context.Context, o StopOptions) (any, error) { return d.StopContainer(ctx, o) })
	handle(mux, "POST /v1/containers/kill", func(ctx context.Context, o StopOptions) (any, error) { return d.KillContainer(ctx, o) })
	handle(mux, "POST /v1/containers/wait", func(ctx context.Context, o UnmountOptions) (any, error) { return d.WaitContainer(ctx, o.Mount) })
	pour(mux, "POST /v1/containers/logs", d.containerLogs)
}
