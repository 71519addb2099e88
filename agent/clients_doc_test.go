package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// shown is one command of docs/clients.md, and what it is said to print.
type shown struct{ command, output string }

// fenced returns the blocks of a kind in a page.
func fenced(page, kind string) (blocks []string) {
	for _, m := range regexp.MustCompile("(?s)\n```"+kind+"\n(.*?)```").FindAllStringSubmatch(page, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

func readClientsPage(t testing.TB) (commands []shown, program, output string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "docs", "clients.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, block := range fenced(page, "console") {
		command, output, _ := strings.Cut(strings.TrimPrefix(block, "$ "), "\n")
		commands = append(commands, shown{command, output})
	}
	programs, outputs := fenced(page, "go"), fenced(page, "text")
	if len(commands) < 8 || len(programs) != 1 || len(outputs) != 1 {
		t.Fatalf("docs/clients.md has %d commands, %d programs", len(commands), len(programs))
	}
	return commands, programs[0], outputs[0]
}

// varying are the fields that are different on every machine and in every run.
var varying = []string{"appendTime", "id", "answeredBy", "name", "address", "term", "appliedIndex", "version"}

// passing are fields that are there, or not, depending on how long the node runs.
var passing = []string{"healthy", "stableSince"}

// vary makes all values of varying fields the same, and drops passing ones.
func vary(v any) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			if slices.Contains(passing, key) {
				delete(v, key)
				continue
			}
			if slices.Contains(varying, key) && value != "" {
				v[key] = "varies"
			}
			vary(value)
		}
	case []any:
		for _, value := range v {
			vary(value)
		}
	}
}

// same compares outputs; those in JSON by what they mean.
func same(t testing.TB, what, got, want string) {
	t.Helper()
	equal := got == want
	if strings.HasPrefix(want, "{") {
		var g, w any
		if err := errors.Join(json.Unmarshal([]byte(got), &g), json.Unmarshal([]byte(want), &w)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		vary(g)
		vary(w)
		equal = reflect.DeepEqual(g, w)
	}
	if !equal {
		t.Errorf("%s prints\n%s\nand is said to print\n%s", what, got, want)
	}
}

// TestClientsPage runs what docs/clients.md shows against the real thing: with
// grpcurl where there is one, and in any case with the same calls from Go, of
// which this program knows nothing but what reflection tells.
func TestClientsPage(t *testing.T) {
	commands, program, output := readClientsPage(t)
	run := func(t *testing.T, call func(t *testing.T, addr string, c shown)) {
		n := startNode(t, t.TempDir())
		for _, c := range commands {
			c.command = strings.ReplaceAll(c.command, "127.0.0.1:8400", n.addr)
			call(t, n.addr, c)
		}
	}
	t.Run("reflection", func(t *testing.T) { run(t, callByReflection) })

	if grpcurl := findGrpcurl(); grpcurl != "" {
		t.Run("grpcurl", func(t *testing.T) {
			run(t, func(t *testing.T, _ string, c shown) {
				cmd := exec.Command("sh", "-c", c.command+" 2>&1")
				cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(grpcurl)+string(os.PathListSeparator)+os.Getenv("PATH"))
				out, err := cmd.Output()
				var exit *exec.ExitError
				if err != nil && !errors.As(err, &exit) {
					t.Fatal(err)
				}
				same(t, c.command, string(out), c.output)
			})
		})
	} else {
		t.Log("there is no grpcurl here, so that only the same calls from Go were made")
	}

	t.Run("Go", func(t *testing.T) {
		n := startNode(t, t.TempDir())
		produce(t, dial(t, n.addr), "hello", "world")
		file := filepath.Join(t.TempDir(), "main.go")
		program = strings.ReplaceAll(program, "127.0.0.1:8400", n.addr)
		if err := os.WriteFile(file, []byte(program), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("go", "run", file)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v\n%s", err, stderr.String())
		}
		same(t, "the program", string(out), output)
	})
}

func findGrpcurl() string {
	if path, err := exec.LookPath("grpcurl"); err == nil {
		return path
	}
	path, err := filepath.Abs(filepath.Join("..", ".tools", "bin", "grpcurl"))
	if err != nil {
		return ""
	}
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

var curl = regexp.MustCompile(`^grpcurl -plaintext (?:-d '([^']*)' )?(\S+) (list|describe \S+|\S+/\S+)$`)

// callByReflection does what a grpcurl command would.
func callByReflection(t *testing.T, addr string, c shown) {
	m := curl.FindStringSubmatch(c.command)
	if m == nil || m[2] != addr {
		t.Fatalf("this test does not understand %q", c.command)
	}
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request, what := m[1], m[3]
	if what == "list" {
		answer := reflectOn(t, conn, &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		var names strings.Builder
		for _, s := range answer.GetListServicesResponse().GetService() {
			fmt.Fprintln(&names, s.GetName())
		}
		same(t, c.command, names.String(), c.output)
		return
	}
	symbol, describe := strings.CutPrefix(what, "describe ")
	service, method, _ := strings.Cut(symbol, "/")
	answer := reflectOn(t, conn, &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service}})
	var set descriptorpb.FileDescriptorSet
	for _, b := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var file descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(b, &file); err != nil {
			t.Fatal(err)
		}
		set.File = append(set.File, &file)
	}
	files, err := protodesc.NewFiles(&set)
	if err != nil {
		t.Fatal(err)
	}
	found, err := files.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		t.Fatal(err)
	}
	methods := found.(protoreflect.ServiceDescriptor).Methods()
	if describe {
		for i := range methods.Len() {
			if name := "rpc " + string(methods.Get(i).Name()) + " ("; !strings.Contains(c.output, name) {
				t.Errorf("%s is not said to print %q", c.command, name)
			}
		}
		return
	}
	d := methods.ByName(protoreflect.Name(method))
	if d == nil {
		t.Fatalf("%s has no method %s", service, method)
	}
	got, err := invoke(t.Context(), conn, d, request, dynamicpb.NewTypes(files))
	if st, failed := status.FromError(err); err != nil {
		if !failed {
			t.Fatal(err)
		}
		for _, want := range append(errorParts(st), "ERROR:", "Code: "+st.Code().String(), "Message: "+st.Message()) {
			if !strings.Contains(c.output, want) {
				t.Errorf("%s fails with %v, and is not said to print %q", c.command, err, want)
			}
		}
		return
	}
	same(t, c.command, got, c.output)
}

func errorParts(st *status.Status) (parts []string) {
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			parts = append(parts, fmt.Sprintf("%q", info.GetReason()), fmt.Sprintf("%q", info.GetDomain()))
			for k, v := range info.GetMetadata() {
				parts = append(parts, fmt.Sprintf("%q: %q", k, v))
			}
		}
	}
	return parts
}

func reflectOn(t testing.TB, conn *grpc.ClientConn, request *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(request); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if e := answer.GetErrorResponse(); e != nil {
		t.Fatal(e)
	}
	return answer
}

// invoke makes a call with one request, and returns all answers as JSON.
func invoke(ctx context.Context, conn *grpc.ClientConn, d protoreflect.MethodDescriptor, request string, types interface {
	protoregistry.ExtensionTypeResolver
	protoregistry.MessageTypeResolver
}) (string, error) {
	in := dynamicpb.NewMessage(d.Input())
	if request != "" {
		if err := (protojson.UnmarshalOptions{Resolver: types}).Unmarshal([]byte(request), in); err != nil {
			return "", err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: d.IsStreamingServer()}, fmt.Sprintf("/%s/%s", d.Parent().FullName(), d.Name()))
	if err != nil {
		return "", err
	}
	if err := errors.Join(stream.SendMsg(in), stream.CloseSend()); err != nil {
		return "", err
	}
	var all strings.Builder
	for {
		out := dynamicpb.NewMessage(d.Output())
		err := stream.RecvMsg(out)
		if errors.Is(err, io.EOF) {
			return all.String(), nil
		}
		if err != nil {
			return "", err
		}
		b, err := protojson.MarshalOptions{Multiline: true, Resolver: types}.Marshal(out)
		if err != nil {
			return "", err
		}
		all.Write(b)
		if !d.IsStreamingServer() {
			return all.String(), nil
		}
	}
}
