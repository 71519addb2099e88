package rpc

import (
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Explain tells how the server answers an error: gRPC's code, the reason and
// what a person can do about it. It is for those who answer in other protocols,
// and takes errors of this package and gRPC's statuses.
func Explain(err error) (code codes.Code, reason, advice string) {
	st := status.Convert(statusOf(err))
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			reason = d.GetReason()
		case *errdetails.LocalizedMessage:
			advice = d.GetMessage()
		}
	}
	return st.Code(), reason, advice
}
