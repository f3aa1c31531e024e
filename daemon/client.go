package daemon

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Client speaks to the daemon of a set of directories.
type Client struct {
	dirs Dirs
	http *http.Client
	// Start makes a daemon where none answers. It is the default; `varve version`
	// and others that only look turn it off.
	Start bool
	// Notice is told of progress and warnings. It may be nil.
	Notice func(line string)
	// Status is told how far single things are. It may be nil.
	Status func(Status)
}

// NewClient gives a client. It connects when it is first used.
func NewClient(d Dirs) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var nd net.Dialer
		return nd.DialContext(ctx, "unix", d.Socket)
	}
	return &Client{dirs: d, Start: true, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// do sends a request, starting a daemon if need be. The caller closes the body
// of an answer that is not an error.
func (c *Client) do(ctx context.Context, method, path string, in any) (*http.Response, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	for started := false; ; started = true {
		req, err := http.NewRequestWithContext(ctx, method, "http://varve"+path, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := c.http.Do(req)
		switch {
		case err == nil && resp.StatusCode == http.StatusOK:
			return resp, nil
		case err == nil:
			defer resp.Body.Close()
			var e Error
			if derr := json.NewDecoder(resp.Body).Decode(&e); derr != nil || e.Message == "" {
				return nil, fmt.Errorf("the daemon at %s answered %s", c.dirs.Socket, resp.Status)
			}
			return nil, &e
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, syscall.EACCES):
			return nil, fmt.Errorf("this user may not use the daemon at %s", c.dirs.Socket)
		case started || !c.Start || !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNRESET):
			return nil, &Error{Message: fmt.Sprintf("no daemon at %s: %v", c.dirs.Socket, errors.Unwrap(err)), Exit: ExitError}
		}
		if err := c.start(ctx); err != nil {
			return nil, err
		}
	}
}

// start runs this program's own daemon and waits until it answers.
func (c *Client) start(ctx context.Context) error {
	if err := c.dirs.make(); err != nil {
		return err
	}
	logPath := filepath.Join(c.dirs.State, "daemon.log")
	log, err := os.OpenFile(logPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	defer log.Close()
	end, _ := log.Seek(0, io.SeekEnd)
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	cmd := exec.Command(self, "daemon")
	cmd.Env = append(os.Environ(), c.dirs.environ()...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		if conn, err := net.Dial("unix", c.dirs.Socket); err == nil {
			conn.Close()
			return nil
		}
		select {
		case <-exited:
			// Another one may have been started at the same moment and won.
			if conn, err := net.Dial("unix", c.dirs.Socket); err == nil {
				conn.Close()
				return nil
			}
			return fmt.Errorf("the daemon does not start: %s (log: %s)", lastLine(logPath, end), logPath)
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return fmt.Errorf("the daemon does not answer at %s (log: %s)", c.dirs.Socket, logPath)
}

// environ hands the directories on to a daemon, whatever flags chose them.
func (d *Dirs) environ() []string {
	b, err := json.Marshal(d)
	if err != nil {
		panic(err) // strings always can be
	}
	return []string{dirsVariable + "=" + string(b)}
}

const dirsVariable = "VARVE_DIRS"

// InheritedDirs gives the directories that the client which started this process
// handed on.
func InheritedDirs() (d Dirs, ok bool) {
	err := json.Unmarshal([]byte(os.Getenv(dirsVariable)), &d)
	return d, err == nil && d.State != ""
}

func lastLine(path string, from int64) string {
	b, err := os.ReadFile(path)
	if err != nil || int64(len(b)) <= from {
		return "it said nothing"
	}
	lines := strings.Split(strings.TrimSpace(string(b[from:])), "\n")
	return strings.TrimPrefix(lines[len(lines)-1], "varve: ")
}

// get decodes an answer that is one JSON document.
func (c *Client) get(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

// Mount mounts an image and gives what came of it.
func (c *Client) Mount(ctx context.Context, o MountOptions) (*Mount, error) {
	e, err := c.follow(ctx, "/v1/mounts", o)
	return e.Mount, err
}

// Commit makes an image of a mount's changes.
func (c *Client) Commit(ctx context.Context, o CommitOptions) (*Committed, error) {
	e, err := c.follow(ctx, "/v1/commit", o)
	return e.Commit, err
}

// Push sends an image to its registry.
func (c *Client) Push(ctx context.Context, o PushOptions) (*Pushed, error) {
	e, err := c.follow(ctx, "/v1/push", o)
	return e.Push, err
}

// follow sends a request whose answer takes its time, tells what goes on, and
// gives the last event.
func (c *Client) follow(ctx context.Context, path string, in any) (event, error) {
	resp, err := c.do(ctx, http.MethodPost, path, in)
	if err != nil {
		return event{}, err
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(resp.Body)
	for {
		var e event
		if err := dec.Decode(&e); err != nil {
			if ctx.Err() != nil {
				return e, ctx.Err()
			}
			return e, fmt.Errorf("the daemon went away: %w", err)
		}
		switch {
		case e.Error != nil:
			return e, e.Error
		case e.Status != nil:
			if c.Status != nil {
				c.Status(*e.Status)
			}
		case e.Warning != "":
			if c.Notice != nil {
				c.Notice("warning: " + e.Warning)
			}
		case e.Progress != "":
			if c.Notice != nil {
				c.Notice(e.Progress)
			}
		default:
			return e, nil
		}
	}
}

// Index makes indexes of an image's layers.
func (c *Client) Index(ctx context.Context, o IndexOptions) (*Indexed, error) {
	e, err := c.follow(ctx, "/v1/index", o)
	return e.Indexed, err
}

// Indexes lists the indexes that an image has in its registry.
func (c *Client) Indexes(ctx context.Context, o ImageOptions) (xs []ImageIndex, err error) {
	return xs, c.get(ctx, http.MethodPost, "/v1/indexes", o, &xs)
}

// RemoveIndexes deletes indexes of an image from its registry and gives their
// digests.
func (c *Client) RemoveIndexes(ctx context.Context, o IndexRemoval) (digests []string, err error) {
	return digests, c.get(ctx, http.MethodPost, "/v1/indexes/rm", o, &digests)
}

// Drop punches contents of layers out of the store.
func (c *Client) Drop(ctx context.Context, o DropOptions) (ds []Dropped, err error) {
	return ds, c.get(ctx, http.MethodPost, "/v1/store/drop", o, &ds)
}

// Unmount ends a mount and gives its name.
func (c *Client) Unmount(ctx context.Context, o UnmountOptions) (name string, err error) {
	return name, c.get(ctx, http.MethodPost, "/v1/unmount", o, &name)
}

// Mounts lists the mounts, the oldest first, without their layers.
func (c *Client) Mounts(ctx context.Context) (ms []Mount, err error) {
	return ms, c.get(ctx, http.MethodGet, "/v1/mounts", nil, &ms)
}

// Inspect gives all that is known of a mount.
func (c *Client) Inspect(ctx context.Context, name string) (m Mount, err error) {
	return m, c.get(ctx, http.MethodPost, "/v1/inspect", UnmountOptions{Mount: name}, &m)
}

// Version asks what runs.
func (c *Client) Version(ctx context.Context) (v Version, err error) {
	return v, c.get(ctx, http.MethodGet, "/v1/version", nil, &v)
}

// Stop ends the daemon and waits until it is gone.
func (c *Client) Stop(ctx context.Context) error {
	if err := c.get(ctx, http.MethodPost, "/v1/stop", nil, nil); err != nil {
		return err
	}
	for !unlocked(filepath.Join(c.dirs.State, "lock")) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// List calls fn for every file that `varve ls` shows.
func (c *Client) List(ctx context.Context, o PathOptions, fn func(File) error) error {
	resp, err := c.do(ctx, http.MethodPost, "/v1/ls", o)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(bufio.NewReaderSize(resp.Body, 1<<16))
	for {
		var f File
		if err := dec.Decode(&f); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("the daemon went away: %w", err)
		}
		if err := fn(f); err != nil {
			return err
		}
	}
}

// errorTrailer ends an answer whose bytes could not all be read.
const errorTrailer = "Varve-Error"

// Cat writes a file of an image to w.
func (c *Client) Cat(ctx context.Context, o PathOptions, w io.Writer) error {
	return c.copy(ctx, "/v1/cat", o, w)
}

// Export writes the flat tar of a mount, an image or a path in one to w. The tar
// of a path begins with its last name.
func (c *Client) Export(ctx context.Context, o ExportOptions, w io.Writer) error {
	return c.copy(ctx, "/v1/export", o, w)
}

// Save writes images to w as one tar that docker and OCI tools load.
func (c *Client) Save(ctx context.Context, o SaveOptions, w io.Writer) error {
	return c.copy(ctx, "/v1/save", o, w)
}

// copy writes an answer that is bytes to w. What went wrong on the way is in its
// trailer.
func (c *Client) copy(ctx context.Context, path string, in any, w io.Writer) error {
	resp, err := c.do(ctx, http.MethodPost, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return err
	}
	if msg := resp.Trailer.Get(errorTrailer); msg != "" {
		e := &Error{Exit: ExitError}
		if json.Unmarshal([]byte(msg), e) != nil {
			e.Message = msg
		}
		return e
	}
	return nil
}

// Stat tells of a path in a mount or an image; with Follow, of what the last
// symlink leads to.
func (c *Client) Stat(ctx context.Context, o ExportOptions) (f File, err error) {
	return f, c.get(ctx, http.MethodPost, "/v1/stat", o, &f)
}

// Diff lists what changed in a mount.
func (c *Client) Diff(ctx context.Context, mount string) (ds []Delta, err error) {
	return ds, c.get(ctx, http.MethodPost, "/v1/diff", UnmountOptions{Mount: mount}, &ds)
}

// Remove deletes a mount that is not mounted, and its changes.
func (c *Client) Remove(ctx context.Context, o UnmountOptions) (r Removed, err error) {
	return r, c.get(ctx, http.MethodPost, "/v1/rm", o, &r)
}

// Prune deletes all mounts that are not mounted, and their changes.
func (c *Client) Prune(ctx context.Context) (rs []Removed, err error) {
	return rs, c.get(ctx, http.MethodPost, "/v1/prune", struct{}{}, &rs)
}
