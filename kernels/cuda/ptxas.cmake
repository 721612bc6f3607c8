# cmake -DPTXAS= -DARCH= -DPTX= -DOUTPUT= -P ptxas.cmake: what ptxas -v says is
# kept in OUTPUT.txt, and shown where it is an error.
execute_process(COMMAND ${PTXAS} -v -arch=${ARCH} ${PTX} -o ${OUTPUT}
  OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
file(WRITE ${OUTPUT}.txt "${said}")
if(failed)
  message(FATAL_ERROR "${said}")
endif()
