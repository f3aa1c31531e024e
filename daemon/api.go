package daemon

import (
	"context"
	"errors"
	"time"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
)

// Exit codes, as the command gives them and as errors carry them over the
// socket. Scripts rely on them.
const (
	ExitError       = 1
	ExitUsage       = 2
	ExitNotFound    = 3
	ExitAuth        = 4
	ExitUnreachable = 5
	ExitVerify      = 6
	ExitBusy        = 7
)

// Error is an error as it crosses the socket.
type Error struct {
	Message string `json:"message"`
	Exit    int    `json:"exit"`
}

func (e *Error) Error() string { return e.Message }

// errUsage marks what the caller asked for wrongly.
var errUsage = errors.New("usage")

// errNoMount is what a name that fits no mount gives.
var errNoMount = errors.New("no such mount")

// wire gives an error its exit code.
func wire(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	e = &Error{Message: err.Error(), Exit: ExitError}
	for _, c := range []struct {
		is   error
		exit int
	}{
		{errUsage, ExitUsage},
		{image.ErrUnauthorized, ExitAuth},
		{fetch.ErrVerify, ExitVerify}, {index.ErrMalformed, ExitVerify}, {image.ErrMalformed, ExitVerify},
		{image.ErrNotFound, ExitNotFound}, {image.ErrNoPlatform, ExitNotFound}, {errNoMount, ExitNotFound}, {index.ErrNotExist, ExitNotFound},
		{image.ErrUnreachable, ExitUnreachable}, {fetch.ErrUnavailable, ExitUnreachable}, {fetch.ErrOffline, ExitUnreachable},
		{fs.ErrBusy, ExitBusy},
		{context.Canceled, 130},
	} {
		if errors.Is(err, c.is) {
			e.Exit = c.exit
			break
		}
	}
	return e
}

// ImageOptions say which image and how it may be had.
type ImageOptions struct {
	Image    string     `json:"image"`
	Platform string     `json:"platform,omitempty"` // "" is this machine's
	Pull     string     `json:"pull,omitempty"`     // missing (default), always, never
	Offline  bool       `json:"offline,omitempty"`  // never ask the network, for bytes neither
	Insecure bool       `json:"insecure,omitempty"` // plain HTTP and unverified TLS allowed
	Auth     image.Auth `json:"auth"`               // where credentials are, never what they are
	// AuthConfig is the caller's DOCKER_AUTH_CONFIG. It crosses the socket and is
	// never stored: after a restart the mount has what Auth names.
	AuthConfig string `json:"auth_config,omitempty"`

	target string // the image ID of a mount that comes back, whatever its tag names by now
}

// MountOptions are what `varve mount` asks for.
type MountOptions struct {
	ImageOptions
	Dir    string `json:"dir,omitempty"`  // absolute; "" for one below the runtime directory
	Name   string `json:"name,omitempty"` // "" for one made from the image's
	Face   string `json:"face,omitempty"` // auto (default), kernel, fuse
	Setuid bool   `json:"setuid,omitempty"`
}

// Mount is what is known of a mount.
type Mount struct {
	ID         string    `json:"Id"`
	Name       string    `json:"Name"`
	Image      string    `json:"Image"`
	Target     string    `json:"Digest"`   // of what the name points at
	Manifest   string    `json:"Manifest"` // digest of the platform's manifest
	Config     string    `json:"Config"`   // digest of the config
	Platform   string    `json:"Platform"`
	Dir        string    `json:"Mountpoint"`
	State      string    `json:"State"` // mounted, restoring, failed
	Error      string    `json:"Error,omitempty"`
	Created    time.Time `json:"Created"`
	Face       string    `json:"Face"`
	FaceReason string    `json:"FaceReason"`
	Offline    bool      `json:"Offline"`
	Files      uint64    `json:"Files"`   // inodes of the image
	Size       int64     `json:"Size"`    // bytes of all layers, compressed
	Fetched    int64     `json:"Fetched"` // bytes that the network brought for them
	Local      int64     `json:"Local"`   // bytes of them, compressed, that are here
	Layers     []Layer   `json:"Layers,omitempty"`
}

// Layer is what is known of a layer of a mount.
type Layer struct {
	Digest    string `json:"Digest"`
	DiffID    string `json:"DiffID,omitempty"`
	MediaType string `json:"MediaType"`
	Format    string `json:"Format"`
	Reason    string `json:"Reason"`
	Size      int64  `json:"Size"`
	Fetched   int64  `json:"Fetched"`
	Local     int64  `json:"Local"`
	Whole     bool   `json:"Whole"`
}

// UnmountOptions are what `varve umount` asks for.
type UnmountOptions struct {
	Mount string `json:"mount"` // a name, an id or the beginning of one, a directory
	Force bool   `json:"force,omitempty"`
	Lazy  bool   `json:"lazy,omitempty"`
}

// PathOptions name a path in an image.
type PathOptions struct {
	ImageOptions
	Path      string `json:"path"`
	Recursive bool   `json:"recursive,omitempty"`
}

// File is a name of an image, as `varve ls` shows it.
type File struct {
	Path    string    `json:"path"` // from the root, with a leading slash
	Mode    uint32    `json:"mode"`
	Nlink   uint32    `json:"nlink"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Size    int64     `json:"size"`
	Rdev    uint32    `json:"rdev,omitempty"`
	ModTime time.Time `json:"mtime"`
	Link    string    `json:"link,omitempty"`
	Dir     bool      `json:"dir,omitempty"` // begins the listing of a directory
}

// Version says what runs.
type Version struct {
	Version   string `json:"Version"`
	GoVersion string `json:"GoVersion"`
	Revision  string `json:"Revision"`
	PID       int    `json:"Pid,omitempty"`
	Root      string `json:"State,omitempty"`
}

// event is a line of an answer that takes its time: progress, then a result or
// an error.
type event struct {
	Progress string `json:"progress,omitempty"`
	Warning  string `json:"warning,omitempty"`
	Mount    *Mount `json:"mount,omitempty"`
	Error    *Error `json:"error,omitempty"`
}
