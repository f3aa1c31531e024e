package monitor

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/varvefs/varve/run"
)

// What is said on the socket: frames of a kind (one byte), a length (four bytes,
// big-endian) and a payload. A client's first frame is a request; the answer is a
// reply. A connection is one request: of most
// there is no more. After the reply to attach and exec it is a stream of input one
// way and output the other, ended by an exit. Signals and sizes come by connections
// of their own: input that nobody reads would hold them up.
const (
	kindRequest  byte = 1 + iota // client: request
	kindReply                    // monitor: reply
	kindStdin                    // client: bytes
	kindStdinEnd                 // client: no more of them
	kindDetach                   // client: goes, and leaves stdin open; of freeze: thaw
	kindStdout                   // monitor: bytes
	kindStderr                   // monitor: bytes
	kindStarted                  // monitor: reply, when the process was started
	kindExit                     // monitor: Exit, the last frame
)

const (
	maxFrame = 4 << 20  // a request has a process' arguments and environment
	maxData  = 32 << 10 // bytes of input or output in a frame
)

// The requests.
const (
	opStart  = "start"
	opAttach = "attach"
	opExec   = "exec"
	opSignal = "signal"
	opResize = "resize"
	opPause  = "pause"
	opResume = "resume"
	opFreeze = "freeze"
	opWait   = "wait"
	opPing   = "ping"
)

type request struct {
	Op     string
	Start  bool             `json:",omitempty"` // attach: and start it
	Stdin  bool             `json:",omitempty"` // attach, exec: input will come
	Exec   *run.ExecOptions `json:",omitempty"` // exec
	Target string           `json:",omitempty"` // signal, resize: which exec, "" for the init
	Signal int              `json:",omitempty"`
	Height uint16           `json:",omitempty"` // attach, exec, resize; 0: unknown
	Width  uint16           `json:",omitempty"`
}

type reply struct {
	Error   string    `json:",omitempty"`
	Code    int       `json:",omitempty"` // of a StartError
	Target  string    `json:",omitempty"` // exec: its name
	Started time.Time `json:",omitzero"`
}

func (r *reply) err() error {
	switch {
	case r.Error == "":
		return nil
	case r.Code != 0:
		return &StartError{Code: r.Code, Message: r.Error}
	}
	return errors.New(r.Error)
}

func failed(err error) reply {
	var se *StartError
	if errors.As(err, &se) {
		return reply{Error: se.Message, Code: se.Code}
	}
	return reply{Error: err.Error()}
}

// wire is one end of a connection. Frames may be written by several at once.
type wire struct {
	net.Conn
	writing sync.Mutex
}

// encode gives a frame as it is sent.
func encode(kind byte, payload []byte) []byte {
	b := make([]byte, 5+len(payload))
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], uint32(len(payload)))
	copy(b[5:], payload)
	return b
}

func encodeJSON(kind byte, v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // our own types
	}
	return encode(kind, b)
}

func (w *wire) send(frame []byte) error {
	w.writing.Lock()
	defer w.writing.Unlock()
	_, err := w.Write(frame)
	return err
}

// receive reads a frame. The payload is the caller's.
func (w *wire) receive() (kind byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(w, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("a frame of %d bytes, the limit is %d", n, maxFrame)
	}
	payload = make([]byte, n)
	if _, err := io.ReadFull(w, payload); err != nil {
		return 0, nil, err
	}
	return head[0], payload, nil
}

// receiveJSON reads a frame that must be of a kind.
func (w *wire) receiveJSON(want byte, v any) error {
	kind, payload, err := w.receive()
	if err != nil {
		return err
	}
	if kind != want {
		return fmt.Errorf("a frame of kind %d where %d belongs", kind, want)
	}
	return json.Unmarshal(payload, v)
}
